"""Text: captions in training, prompts in sampling."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sfumato.conditioners import (
    Conditioner,
    ConditioningInfo,
    LearnedTextConfig,
    PipelineTextConfig,
    PretrainedTextConfig,
)
from sfumato.contexts.protocol import Context, Encoder, RequestInfo, cycle
from sfumato.data import Dataset

TextConfig = LearnedTextConfig | PretrainedTextConfig | PipelineTextConfig
NAMED = 10  # words in one message
# What a model of images and text knows: things, people, places, styles and counts, each once.
KNOWN_PROMPTS = (
    "a photo of a dog",
    "a photo of a cat on a sofa",
    "a bird on a branch",
    "a horse in a field",
    "a portrait of a woman",
    "a portrait of an old man",
    "two children playing on a beach",
    "a crowd in a street",
    "a red car",
    "a bicycle against a wall",
    "a wooden house in the snow",
    "a city at night",
    "a mountain lake",
    "a forest path in autumn",
    "waves on a rocky shore",
    "a bowl of fruit on a table",
    "a cup of coffee",
    "a vase with flowers",
    "a stack of books",
    "an oil painting of a ship",
    "a pencil drawing of a hand",
    "a watercolour of a garden",
    "a map of an island",
    "a blue chair",
)


class PromptNote(UserWarning):
    """A warning about a prompt: the images may not be what it says."""


class Truncated(PromptNote):
    """A prompt is longer than the model reads; the message says which part it reads."""


class Unfamiliar(PromptNote):
    """A prompt has words that the model did not see in training; the message names them."""


class Text(Context):
    """One text for each image."""

    name = "text"
    keyword = "prompt"
    negative = "negative"
    config = TextConfig
    missing_data_hint = ("captions", "put a .txt beside each image")

    def build(
        self,
        config: TextConfig,
        info: ConditioningInfo,
        encoder: Encoder,
    ) -> Conditioner:
        """Build the conditioner; raise ConfigError if the training set has no captions."""
        if config.needs_captions:
            self.require(info.words)
        return config.build(info.words, encoder)

    def info_fields(self, config: TextConfig, dataset: Dataset) -> Mapping[str, Any]:
        """Return the words of the training captions, the most frequent first."""
        return {
            "words": config.words(
                text for texts in dataset.captions(dataset.training) for text in texts
            )
        }

    def carried(
        self, config: TextConfig, before: ConditioningInfo, now: ConditioningInfo
    ) -> ConditioningInfo:
        """Keep the words of a conditioner that learns a vector for each."""
        return replace(now, words=before.words) if config.learns_words else now

    def parse(self, value: str | Sequence[str], request: RequestInfo) -> list[str]:
        """Return `request.num` prompts, repeated in order; warn of truncation and unknown words."""
        texts = cycle([value] if isinstance(value, str) else list(value), request.num, "prompt")
        _note(texts, request.conditioner)
        return texts

    def parse_negative(self, value: str, request: RequestInfo) -> list[str]:
        """Return the negative prompt `request.num` times, with the warnings of `parse`."""
        _note([value], request.conditioner)
        return [request.conditioner.as_negative(value)] * request.num

    def known_values(
        self, info: ConditioningInfo, dataset: Dataset, prompts: Sequence[str]
    ) -> list[str]:
        """Return the prompts, or 24 that most models of text know."""
        return list(prompts or KNOWN_PROMPTS)

    def words(self, values: Sequence[str], info: ConditioningInfo) -> list[str]:
        """Return the texts themselves."""
        return list(values)


def _note(texts: Sequence[str], conditioner: Any) -> None:
    """Warn of truncated texts and of words that no training caption contains, each once."""
    different = list(dict.fromkeys(texts))
    for text in different:
        if conditioner.is_truncated(text):
            kept_text = conditioner.truncate(text)
            excerpt = (
                kept_text if len(kept_text) <= 60 else f"{kept_text[:40]} ... {kept_text[-15:]}"
            )
            warnings.warn(
                f"a prompt has {len(text)} characters, of which the model reads the first "
                f"{len(kept_text)}: {excerpt!r}",
                Truncated,
                stacklevel=6,
            )
    unknown = list(
        dict.fromkeys(
            word
            for text in different
            for word in conditioner.unknown_words(conditioner.truncate(text))
        )
    )
    if not unknown:
        return
    listed = ", ".join(
        f'"{_printable(word if len(word) <= 40 else word[:37] + "...")}"'
        for word in unknown[:NAMED]
    )
    more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
    pronoun = "it is" if len(unknown) == 1 else "they are"
    encoding = (
        "encoded as bytes"
        if conditioner.learns_bytes
        else "encoded as bytes, which this model was not trained on (conditioner.text.spelled=0)"
    )
    warnings.warn(
        f"the training captions never contained: {listed}{more}; {pronoun} {encoding}",
        Unfamiliar,
        stacklevel=6,
    )


def _printable(word: str) -> str:
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in word)
