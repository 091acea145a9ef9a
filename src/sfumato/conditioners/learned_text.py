"""Text: a small transformer over words, trained along with the model, so that captions work without
a download.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sfumato.condition import Condition, ContextSizes
from sfumato.conditioners.protocol import Conditioner
from sfumato.conditioners.tokenizer import (
    BYTES,
    FIRST_WORD,
    MOST_WORDS,
    PAD,
    ByRuns,
    ByScript,
    Splitting,
    WordTokenizer,
)
from sfumato.config import since
from sfumato.config.bounds import CountOrZero, Fraction, Size
from sfumato.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LearnedTextConfig:
    """Steer by captions, read by a transformer that is trained along with the model.

    Attributes:
        size: channels of tokens and of their summary.
        layers, heads: of the transformer.
        length: maximum number of tokens of a text, including the one that marks its start; longer
            texts are truncated with a warning.
        vocabulary: maximum number of words with a token of their own; others are encoded as bytes.
        dropout: share of training samples whose caption is hidden, which is what guidance
            extrapolates from.
        spelled: fraction of the words in training captions that are spelled in bytes although they
            are known, so that the bytes of an
            unknown word in a prompt are not meaningless; at most one word of a caption, of its
            first 1 / `spelled`. Validation and
            sampling spell none of them.
        splitting: how texts are split into words.
    """

    kind: ClassVar[str] = "learned"
    needs_captions: ClassVar[bool] = True
    learns_words: ClassVar[bool] = True

    size: Size = 128
    layers: Size = 2
    heads: Size = 4
    length: Size = 24
    vocabulary: CountOrZero = 20_000
    dropout: Fraction = 0.1
    spelled: Fraction = since(0.02, before=0.0)
    splitting: Splitting = since(ByScript(), before=ByRuns())

    def __post_init__(self) -> None:
        if not 0 <= self.spelled <= 1:
            raise ConfigError(
                f"spelled = {self.spelled}",
                where="conditioner.text.spelled",
                hint="use a fraction of the words, from 0 to 1",
            )
        if (
            min(self.size, self.layers, self.heads, self.length - 1) < 1
            or self.size % self.heads
            or self.vocabulary < 0
        ):
            raise ConfigError(
                f"{self}",
                where="conditioner.text",
                hint="size, layers and heads are at least 1, length 2, and heads divide size",
            )

    def words(self, captions: Iterable[str]) -> tuple[str, ...]:
        """Return the words of captions, the most frequent first, at most 50,000."""
        return WordTokenizer.fit(captions, most=MOST_WORDS, splitting=self.splitting).vocabulary

    def build(self, words: Sequence[str], encoder: object) -> LearnedTextConditioner:
        """Build the untrained conditioner for captions of these words."""
        return LearnedTextConditioner(
            self,
            words=WordTokenizer(tuple(words[: self.vocabulary]), self.splitting),
            rare=words[self.vocabulary :],
        )


class LearnedTextConditioner(Conditioner):
    """context["text"], B texts -> Condition.vector (B, size), tokens (B, length, size) and their
    mask.

    An empty text gives the null condition.
    """

    def __init__(
        self, config: LearnedTextConfig, *, words: WordTokenizer, rare: Sequence[str] = ()
    ) -> None:
        """Build the transformer.

        Args:
            rare: words that occur in captions but are spelled in bytes, since the vocabulary is
                full.
        """
        super().__init__()
        self.config, self.words, self.dropout = config, words, config.dropout
        self._known = frozenset([*words.vocabulary, *rare])
        self.length = config.length
        self.learns_bytes = config.spelled > 0 or bool(rare)
        self.sizes = ContextSizes(vector=config.size, tokens=config.size)
        self.embedding = nn.Embedding(len(words), config.size, padding_idx=PAD)
        # bytes that no caption spells must not resemble a word
        nn.init.zeros_(self.embedding.weight.data[BYTES:FIRST_WORD])
        self.positions = nn.Parameter(torch.randn(config.length, config.size) * 0.02)
        layer = nn.TransformerEncoderLayer(
            config.size,
            config.heads,
            4 * config.size,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.transformer = nn.TransformerEncoder(
            layer, config.layers, norm=nn.LayerNorm(config.size), enable_nested_tensor=False
        )
        self.summary = nn.Linear(config.size, config.size)

    def forward(self, context: Mapping[str, Any], batch_size: int) -> Condition:
        """Encode the texts; a missing context is B empty texts."""
        return self._encode(
            context.get("text", [""] * batch_size), context.get("spelled", [None] * batch_size)
        )

    def augmented(self, context: Mapping[str, Any], draws: Tensor) -> Mapping[str, Any]:
        """Add to the context which word of each caption training spells in bytes.

        Each of the first 1 / `config.spelled` words is spelled with a probability of
        `config.spelled`, at most one in a caption.

        Args:
            draws: (B,), uniform from `dropout` to 1 where the caption is not hidden. One draw
                decides both whether a word of a caption is spelled and which.
        """
        if not self.config.spelled or "text" not in context:
            return context
        chances = ((draws - self.dropout) / max(1 - self.dropout, 1e-9)).tolist()
        return {
            **context,
            "spelled": [
                int(chance / self.config.spelled) if chance >= 0 else None for chance in chances
            ],
        }

    def null(self, batch_size: int) -> Condition:
        """Return the condition of empty texts."""
        return self._encode([""], [None]).expand(batch_size)

    def as_negative(self, text: str) -> str:
        """Return a text as `forward` takes it where guidance leads away from it."""
        return text

    def truncate(self, text: str) -> str:
        """Return the part of a text that is not truncated."""
        return self.words.truncate(text, length=self.config.length)

    def token_ids(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a text, truncated.

        Texts that the model cannot tell apart have the same ids.
        """
        return tuple(self.words.encode(text, length=self.config.length))

    def is_truncated(self, text: str) -> bool:
        """Return whether a text has more than `length` tokens."""
        return self.words.count(text) > self.config.length

    def pieces(self, word: str) -> list[str]:
        """Return the word itself: how it is read is learned along with the model."""
        return [word]

    def unknown_words(self, text: str) -> list[str]:
        """Return the words of a text that no training caption contains, each once.

        Punctuation does not count.
        """
        different = dict.fromkeys(self.words.splitting.pieces(text))
        return [
            word
            for word in different
            if word not in self._known and not all(unicodedata.category(c)[0] == "P" for c in word)
        ]

    def _encode(self, texts: Sequence[str], spelled: Sequence[int | None]) -> Condition:
        length = self.config.length
        numbers = torch.tensor(
            [
                self.words.encode(text, length=length, spelled=word)
                for text, word in zip(texts, spelled, strict=True)
            ]
        )
        numbers = numbers.to(self.positions.device)
        mask = numbers != PAD
        tokens = self.transformer(
            self.embedding(numbers) + self.positions, src_key_padding_mask=~mask
        )
        tokens = tokens * mask[..., None]
        mean = tokens.sum(1) / mask.sum(1, keepdim=True)
        return Condition(vector=self.summary(mean), tokens=tokens, token_mask=mask)
