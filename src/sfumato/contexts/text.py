"""Text: captions in training, prompts in sampling."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from sfumato.conditioners import (
    Conditioner,
    ConditioningInfo,
    LearnedTextConfig,
    PretrainedTextConfig,
)
from sfumato.contexts.protocol import Context, Encoder, RequestInfo, cycled
from sfumato.data import Dataset

NAMED = 10  # words in one message


class PromptNote(UserWarning):
    """A warning about a prompt: the images may not be what it says."""


class Truncated(PromptNote):
    """A prompt is longer than the model reads; the message says which part it sees."""


class Unfamiliar(PromptNote):
    """A prompt has words that the model did not see in training; the message names them."""


class Text(Context):
    """One text for each image."""

    name = "text"
    keyword = "prompt"
    negative = "negative"
    config = LearnedTextConfig | PretrainedTextConfig
    lacking = ("captions", "put a .txt beside each image")

    def build(
        self,
        config: LearnedTextConfig | PretrainedTextConfig,
        facts: ConditioningInfo,
        encoder: Encoder,
    ) -> Conditioner:
        """Build the conditioner; raise ConfigError if the training set has no captions."""
        self.require(facts.words)
        return config.build(facts.words, encoder)

    def facts(
        self, config: LearnedTextConfig | PretrainedTextConfig, dataset: Dataset
    ) -> Mapping[str, Any]:
        """Return the words of the training captions, the most frequent first."""
        return {
            "words": config.words(
                text for position in dataset.training for text in dataset.entries[position].captions
            )
        }

    def parse(self, value: str | Sequence[str], asked: RequestInfo) -> list[str]:
        """Return `asked.num` prompts, taken in turn; warn of parts cut off and unknown words."""
        texts = cycled([value] if isinstance(value, str) else list(value), asked.num, "prompt")
        _note(texts, asked.conditioner)
        return texts

    def parse_negative(self, value: str, asked: RequestInfo) -> list[str]:
        """Return the negative prompt `asked.num` times, with the warnings of `parse`."""
        _note([value], asked.conditioner)
        return [value] * asked.num

    def words(self, values: Sequence[str], facts: ConditioningInfo) -> list[str]:
        """Return the texts themselves."""
        return list(values)


def _note(texts: Sequence[str], conditioner: Any) -> None:
    """Warn of what is cut off and of words that no caption contains, each once."""
    different = list(dict.fromkeys(texts))
    for text in different:
        if conditioner.cuts(text):
            read = conditioner.read(text)
            shown = read if len(read) <= 60 else f"{read[:40]} ... {read[-15:]}"
            warnings.warn(
                f"of a prompt of {len(text)} characters the model reads {len(read)}: {shown!r}",
                Truncated,
                stacklevel=6,
            )
    unknown = list(
        dict.fromkeys(
            word for text in different for word in conditioner.unknown(conditioner.read(text))
        )
    )
    if not unknown:
        return
    shown = ", ".join(
        f'"{_printable(word if len(word) <= 40 else word[:37] + "...")}"'
        for word in unknown[:NAMED]
    )
    more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
    how = "it is" if len(unknown) == 1 else "they are"
    meaning = (
        ""
        if conditioner.learns_letters
        else ", and letters mean nothing to this model, which was trained without spelled words"
    )
    warnings.warn(
        f"the captions never contained: {shown}{more}; {how} read letter by letter{meaning}",
        Unfamiliar,
        stacklevel=6,
    )


def _printable(word: str) -> str:
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in word)
