"""Text: a small transformer over words, trained along with the model, so that captions work with nothing downloaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.condition import Condition, ContextSizes
from sfumato.conditioners.words import BYTES, FIRST_WORD, PAD, Words
from sfumato.config.bounds import CountOrZero, FractionBelowOne, Size
from sfumato.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class WordsConfig:
    """Steer by captions, read by a transformer that is trained along with the model.

    Attributes:
        size: channels of tokens and of their summary.
        layers, heads: of the transformer.
        length: tokens that are read of a text, the one that marks its start included; what is longer is cut, and said to be.
        vocabulary: most words with a number of their own; others are spelled in bytes.
        dropout: share of training samples whose caption is hidden, which is what guidance extrapolates from.
    """

    size: Size = 128
    layers: Size = 2
    heads: Size = 4
    length: Size = 24
    vocabulary: CountOrZero = 20_000
    dropout: FractionBelowOne = 0.1

    def __post_init__(self) -> None:
        if min(self.size, self.layers, self.heads, self.length - 1) < 1 or self.size % self.heads or self.vocabulary < 0:
            raise ConfigError(
                f"{self}",
                where="conditioner.text",
                mend="size, layers and heads are at least 1, length 2, and heads divide size",
            )

    def build(self, words: Sequence[str], encoder: object) -> WordsConditioner:
        """The untrained conditioner for captions of these words."""
        return WordsConditioner(self, words=Words(tuple(words[: self.vocabulary])))


class WordsConditioner(nn.Module):
    """context["text"], B texts -> Condition.vector (B, size), tokens (B, length, size) and their mask; "" asks for nothing."""

    def __init__(self, config: WordsConfig, *, words: Words) -> None:
        super().__init__()
        self.config, self.words, self.dropout = config, words, config.dropout
        self.sizes = ContextSizes(vector=config.size, tokens=config.size)
        self.embedding = nn.Embedding(len(words), config.size, padding_idx=PAD)
        nn.init.zeros_(self.embedding.weight.data[BYTES:FIRST_WORD])  # what no caption spells must not sound like a word
        self.positions = nn.Parameter(torch.randn(config.length, config.size) * 0.02)
        layer = nn.TransformerEncoderLayer(
            config.size, config.heads, 4 * config.size, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(
            layer, config.layers, norm=nn.LayerNorm(config.size), enable_nested_tensor=False
        )
        self.summary = nn.Linear(config.size, config.size)

    def forward(self, context: Mapping[str, Any], batch_size: int) -> Condition:
        """The condition of a batch."""
        return self._read(context.get("text", [""] * batch_size))

    def derive(self, images: Tensor, context: Mapping[str, Any], *, seed: int, first: int) -> dict[str, Any]:
        """Nothing that the data do not hold."""
        return {}

    def null(self, batch_size: int) -> Condition:
        """The condition that asks for nothing."""
        return self._read([""]).expanded(batch_size)

    def read(self, text: str) -> str:
        """The part of a text that is not cut off."""
        return self.words.read(text, length=self.config.length)

    def _read(self, texts: Sequence[str]) -> Condition:
        numbers = torch.tensor([self.words.encode(text, length=self.config.length) for text in texts])
        numbers = numbers.to(self.positions.device)
        mask = numbers != PAD
        tokens = self.transformer(self.embedding(numbers) + self.positions, src_key_padding_mask=~mask)
        tokens = tokens * mask[..., None]
        mean = tokens.sum(1) / mask.sum(1, keepdim=True)
        return Condition(vector=self.summary(mean), tokens=tokens, token_mask=mask)
