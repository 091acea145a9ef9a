"""The captions of a dataset.

They decide whether text steers a model and how many tokens it reads; what is cut off is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from sfumato.conditioners import (
    CompositeConditioner,
    LearnedTextConfig,
    PretrainedTextConfig,
    TextEncoder,
    WordTokenizer,
)
from sfumato.contexts import Text, part_of
from sfumato.data import Dataset, Entry
from sfumato.data.check.captions import is_placeholder
from sfumato.recipes.run import Run

FEWEST = 8  # images with a caption: of fewer, the hold-out may take all
LOOKED_AT = 20_000  # captions that decide on the length, spread evenly over the set
SHORTEST, LONGEST, STEP = 16, 128, 8  # tokens
# tokens for one word of eight letters that is spelled: a slip in a prompt, or a word that training
# spells
ROOM = 7


class Reader(Protocol):
    """A conditioner that reads `length` tokens of a text."""

    @property
    def length(self) -> int:
        """The number of tokens that are read of a text."""
        ...

    def token_ids(self, text: str) -> tuple[int, ...]:
        """Return the numbers of the tokens that are read of a text.

        They are equal for texts that the model cannot tell apart.
        """
        ...

    def is_truncated(self, text: str) -> bool:
        """Return whether a text has more tokens than are read."""
        ...


@dataclass(frozen=True, kw_only=True)
class CaptionSurvey:
    """What the captions of a dataset are good for.

    Attributes:
        images, captioned: images in all, and those with a caption that says something.
        different: different captions.
        length: tokens that hold 95 % of the captions, with room for one spelled word; a multiple of
            8 from 16 to 128.
    """

    images: int
    captioned: int
    different: int
    length: int

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> CaptionSurvey:
        """Survey all captions, and the tokens of some 20,000 of them spread over the set."""
        usable = [
            texts
            for entry in entries
            if (texts := [text for text in entry.captions if not is_placeholder(text)])
        ]
        captions = [text for texts in usable for text in texts]
        different = len(set(captions))
        return cls(
            images=len(entries),
            captioned=len(usable),
            different=different,
            length=fitting_length(captions),
        )

    @property
    def usable(self) -> bool:
        """Whether captions steer the model.

        They do if at least 8 images or most of the set have one, and they differ.
        """
        return self.different > 1 and (self.captioned >= FEWEST or 2 * self.captioned > self.images)

    @property
    def text(self) -> LearnedTextConfig | None:
        """How captions are read; None if they are not used."""
        return LearnedTextConfig(length=self.length) if self.usable else None

    @property
    def reasons(self) -> list[str]:
        """What is chosen, and why; [] if there are no captions."""
        if not self.captioned:
            return []
        share = f"{self.captioned / self.images:.0%} of the images ({self.captioned} of {self.images}) have captions"
        if not self.usable:
            why = (
                "all of them are the same"
                if self.different == 1
                else f"fewer than {FEWEST} are too few to learn to read from"
            )
            return [f"{share}: the text is not used, since {why}"]
        others = (
            "" if self.captioned == self.images else "; the others are trained without a caption"
        )
        return [f"{share}: steered by text, which a small transformer learns to read{others}"]


def fitting_length(captions: Sequence[str]) -> int:
    """Return the number of tokens that holds 95 % of the captions, with the tokenizer of new runs.

    It has room for one spelled word, and is a multiple of 8 from 16 to 128.
    """
    if not captions:
        return SHORTEST
    spread = captions[:: max(1, len(captions) // LOOKED_AT)]
    config = LearnedTextConfig()
    words = WordTokenizer(config.words(spread)[: config.vocabulary], config.splitting)
    most = int(np.quantile([words.count(text) for text in spread], 0.95, method="higher"))
    return min(LONGEST, max(SHORTEST, -(-(most + ROOM) // STEP) * STEP))


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How many captions a model reads only in part.

    Attributes:
        different: captions, equal ones counted once.
        cut: how many of them are longer than what is read.
        confused: how many of them differ only in what is cut off, so that the model takes them for
            the same.
    """

    different: int
    cut: int
    confused: int
    length: int

    @classmethod
    def of(cls, captions: Iterable[str], reader: Reader) -> Cut:
        """Read every caption; captions that differ only in capitals or spaces count as one."""
        different = {" ".join(text.casefold().split()) for text in captions}
        long = {text for text in different if reader.is_truncated(text)}
        alike = Counter(reader.token_ids(text) for text in long)
        if long:
            alike.update(
                seen for text in different - long if (seen := reader.token_ids(text)) in alike
            )  # what ends where others go on
        confused = sum(count for count in alike.values() if count > 1)
        return cls(different=len(different), cut=len(long), confused=confused, length=reader.length)

    @property
    def lines(self) -> list[str]:
        """What a user should know about cut captions before training; [] without captions."""
        if not self.different:
            return []
        if not self.cut:
            return [
                f"captions: none of {self.different} different ones is cut; the model reads "
                f"{self.length} tokens"
            ]
        found = [
            f"captions: {self.cut} of {self.different} different ones are cut, since the model "
            f"reads {self.length} tokens "
            "(conditioner.text.length)"
        ]
        if self.confused:
            found.append(
                f"warning: {self.confused} captions differ only in what is cut off, so the model "
                "cannot tell them apart; "
                "raise conditioner.text.length"
            )
        return found


def cut_captions(dataset: Dataset, conditioner: CompositeConditioner) -> list[str]:
    """Return lines on the training captions that are cut; [] if the model reads no text."""
    part = part_of(conditioner, Text)
    if part is None:
        return []
    captions = (
        text for position in dataset.training for text in dataset.entries[position].captions
    )
    return Cut.of(captions, part).lines


def reader_of(
    run: Run, captions: Sequence[str], encoder: Callable[[PretrainedTextConfig], TextEncoder]
) -> Reader:
    """Build the text conditioner that would read the captions in a run.

    If the run reads no text, its length is chosen for the captions. It is built on the meta device,
    since it only counts tokens.
    """
    config = run.conditioner.text or LearnedTextConfig(length=fitting_length(captions))
    with torch.device("meta"):  # it only counts
        return config.build(config.words(captions), encoder)
