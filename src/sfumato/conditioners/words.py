"""Texts as numbers, with a vocabulary fitted to the captions: known words whole, anything else spelled in bytes."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

PAD, START, NOTHING, BYTES = 0, 1, 2, 3  # what numbers mean; a byte b is BYTES + b, then come the words
FIRST_WORD = BYTES + 256
_PIECE = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Words:
    """A tokenizer. Case and width of letters do not matter; no text in any script is unreadable to it.

    Attributes:
        vocabulary: the words that have a number of their own.
    """

    vocabulary: tuple[str, ...]
    _numbers: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_numbers", {word: FIRST_WORD + i for i, word in enumerate(self.vocabulary)})

    @classmethod
    def fitted(cls, captions: Iterable[str], *, most: int) -> Words:
        """The `most` most frequent words of the captions."""
        counts = Counter(piece for caption in captions for piece in pieces(caption))
        frequent = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(tuple(frequent[:most]))

    def __len__(self) -> int:
        return FIRST_WORD + len(self.vocabulary)

    def encode(self, text: str, *, length: int) -> list[int]:
        """Numbers of a text, `length` of them: START, then what fits of the text, then PAD; NOTHING alone for an empty text."""
        numbers = self._spelled(text, length)
        if not numbers:
            return [NOTHING] + [PAD] * (length - 1)
        return ([START, *numbers] + [PAD] * length)[:length]

    def read(self, text: str, *, length: int) -> str:
        """The part of a text that `encode` does not cut off."""
        most = length - 1
        found: list[str] = []
        for piece in _PIECE.findall(text):
            most -= sum(1 for _ in self._of(normalized(piece)))
            if most < 0:
                return " ".join(found)
            found.append(piece)
        return text

    def _spelled(self, text: str, length: int) -> list[int]:
        numbers: list[int] = []
        for piece in pieces(text):
            numbers += self._of(piece)
            if len(numbers) >= length:
                break
        return numbers

    def _of(self, piece: str) -> list[int]:
        known = self._numbers.get(piece)
        return [known] if known is not None else [BYTES + byte for byte in piece.encode(errors="replace")]


def normalized(text: str) -> str:
    """Compatibility forms and case folded together."""
    return unicodedata.normalize("NFKC", text).casefold()


def pieces(text: str) -> list[str]:
    """Words and signs of a text, normalized."""
    return _PIECE.findall(normalized(text))
