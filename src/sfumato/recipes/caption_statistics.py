"""The captions of a dataset: whether a model is conditioned on them, how many tokens it reads, and
how many captions that truncates.
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
SAMPLED = 20_000  # some 20,000 captions, spread evenly over the set, determine the length
SHORTEST, LONGEST, STEP = 16, 128, 8  # tokens
# additional tokens for one spelled word of eight letters: one that is rare, or mistyped in a prompt
SPELLED_WORD = 7


class TruncatingTokenizer(Protocol):
    """A tokenizer that truncates a text to `length` tokens."""

    @property
    def length(self) -> int:
        """The largest number of tokens of a text."""
        ...

    def token_ids(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a text, truncated to `length`.

        They are equal for texts that the model cannot tell apart.
        """
        ...

    def is_truncated(self, text: str) -> bool:
        """Return whether a text has more than `length` tokens."""
        ...


@dataclass(frozen=True, kw_only=True)
class CaptionSurvey:
    """Whether the captions of a dataset can condition a model, and with how many tokens.

    Attributes:
        images, captioned: number of images, and of those with a caption that is no placeholder.
        different: number of distinct captions.
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
    spread = captions[:: max(1, len(captions) // SAMPLED)]
    config = LearnedTextConfig()
    words = WordTokenizer(config.words(spread)[: config.vocabulary], config.splitting)
    most = int(np.quantile([words.count(text) for text in spread], 0.95, method="higher"))
    return min(LONGEST, max(SHORTEST, -(-(most + SPELLED_WORD) // STEP) * STEP))


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """How many captions are truncated.

    Attributes:
        different: number of distinct captions.
        truncated: number of distinct captions that are longer than `length` tokens.
        collisions: number of distinct captions whose truncated tokens equal those of another, so
            that the model cannot tell them apart.
    """

    different: int
    truncated: int
    collisions: int
    length: int

    @classmethod
    def of(cls, captions: Iterable[str], tokenizer: TruncatingTokenizer) -> Truncation:
        """Tokenize every caption; those that differ only in case or spaces count as one."""
        different = {" ".join(text.casefold().split()) for text in captions}
        long = {text for text in different if tokenizer.is_truncated(text)}
        counts = Counter(tokenizer.token_ids(text) for text in long)
        if long:  # a short caption may equal the truncated tokens of a long one
            counts.update(
                ids for text in different - long if (ids := tokenizer.token_ids(text)) in counts
            )
        collisions = sum(count for count in counts.values() if count > 1)
        return cls(
            different=len(different),
            truncated=len(long),
            collisions=collisions,
            length=tokenizer.length,
        )

    @property
    def lines(self) -> list[str]:
        """What a user should know about truncated captions before training; [] without captions."""
        if not self.different:
            return []
        if not self.truncated:
            return [
                f"captions: none of {self.different} distinct captions is truncated; the model "
                f"reads {self.length} tokens"
            ]
        lines = [
            f"captions: {self.truncated} of {self.different} distinct captions are truncated, "
            f"since the model reads {self.length} tokens (conditioner.text.length)"
        ]
        if self.collisions:
            lines.append(
                f"warning: {self.collisions} captions are equal after truncation, so the model "
                "cannot tell them apart; raise conditioner.text.length"
            )
        return lines


def truncated_captions(dataset: Dataset, conditioner: CompositeConditioner) -> list[str]:
    """Return lines on truncated training captions; [] if the model reads no text."""
    part = part_of(conditioner, Text)
    if part is None:
        return []
    captions = (text for texts in dataset.captions(dataset.training) for text in texts)
    return Truncation.of(captions, part).lines


def build_tokenizer(
    run: Run, captions: Sequence[str], encoder: Callable[[PretrainedTextConfig], TextEncoder]
) -> TruncatingTokenizer:
    """Build the text conditioner of a run on the meta device, since it only counts tokens.

    If the run reads no text, the length is chosen for the captions.
    """
    config = run.conditioner.text or LearnedTextConfig(length=fitting_length(captions))
    with torch.device("meta"):
        return config.build(config.words(captions), encoder)
