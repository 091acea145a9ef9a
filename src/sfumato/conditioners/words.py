"""Texts as numbers, with a vocabulary fitted to the captions: known words whole, anything else spelled in bytes."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from sfumato import letters

PAD, START, NOTHING, BYTES = 0, 1, 2, 3  # what numbers mean; a byte b is BYTES + b, then come the words
FIRST_WORD = BYTES + 256
MOST_WORDS = 50_000  # that are kept of a set
_RUN = re.compile(r"\w+|[^\w\s]")
_WORD = re.compile(r"[w_][w_m]*|om*|[.'m]")  # of `letters.kinds`


@dataclass(frozen=True)
class ByScript:
    """Words where the script puts spaces between them, single letters where it does not; marks stay with their letters."""

    def normalized(self, text: str) -> str:
        """Compatibility forms and case folded together; composed and decomposed letters are the same."""
        if text.isascii():
            return text.lower()
        return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Where words and signs begin and end."""
        if text.isascii():
            return (found.span() for found in _RUN.finditer(text))
        return letters.spans(text, _WORD)


@dataclass(frozen=True)
class ByRuns:
    """Runs of letters whatever their script, marks as signs of their own: how runs read that were trained before `ByScript`."""

    def normalized(self, text: str) -> str:
        """Compatibility forms and case folded together."""
        return unicodedata.normalize("NFKC", text).casefold()

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Where words and signs begin and end."""
        return (found.span() for found in _RUN.finditer(text))


Splitting = ByScript | ByRuns


@dataclass(frozen=True)
class Words:
    """A tokenizer. Case and width of letters do not matter; no text in any script is unreadable to it.

    Attributes:
        vocabulary: the words that have a number of their own.
        splitting: what counts as a word.
    """

    vocabulary: tuple[str, ...]
    splitting: Splitting = ByScript()
    _numbers: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_numbers", {word: FIRST_WORD + i for i, word in enumerate(self.vocabulary)})

    @classmethod
    def fitted(cls, captions: Iterable[str], *, most: int, splitting: Splitting = ByScript()) -> Words:
        """The `most` most frequent words of the captions."""
        plain = cls((), splitting)
        counts = Counter(piece for caption in captions for piece in plain.pieces(caption))
        frequent = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(tuple(frequent[:most]), splitting)

    def __len__(self) -> int:
        return FIRST_WORD + len(self.vocabulary)

    def pieces(self, text: str) -> list[str]:
        """Words and signs of a text, normalized."""
        plain = self.splitting.normalized(text)
        return [plain[first:last] for first, last in self.splitting.spans(plain)]

    def encode(self, text: str, *, length: int, spelled: int | None = None) -> list[int]:
        """Numbers of a text, `length` of them: START, then what fits of the text, then PAD; NOTHING alone for an empty text.

        Args:
            spelled: number of a word that is spelled in bytes although it is known, where all of the text still fits.
        """
        numbers = [number for found in self._within(text, length, spelled) for number in found]
        if not numbers:
            return [NOTHING] + [PAD] * (length - 1)
        return ([START, *numbers] + [PAD] * length)[:length]

    def count(self, text: str) -> int:
        """How many numbers a text takes, START included."""
        return 1 + sum(len(self._of(piece)) for piece in self.pieces(text))

    def read(self, text: str, *, length: int) -> str:
        """The part of a text that `encode` does not cut off."""
        if self.count(text) <= length:
            return text
        end, room = 0, length - 1
        for first, last in self.splitting.spans(text):
            room -= sum(len(self._of(piece)) for piece in self.pieces(text[first:last]))
            if room < 0:
                break
            end = last
        return text[:end]

    def _within(self, text: str, length: int, spelled: int | None) -> list[list[int]]:
        """The numbers of each word, up to the one that exceeds the length."""
        found, count = [], 1
        pieces = self.pieces(text)
        for piece in pieces:
            found.append(self._of(piece))
            count += len(found[-1])
            if count > length:
                return found
        if spelled is not None and spelled < len(found):
            as_bytes = _bytes(pieces[spelled])
            if count - len(found[spelled]) + len(as_bytes) <= length:
                found[spelled] = as_bytes
        return found

    def _of(self, piece: str) -> list[int]:
        known = self._numbers.get(piece)
        return [known] if known is not None else _bytes(piece)


def _bytes(piece: str) -> list[int]:
    return [BYTES + byte for byte in piece.encode(errors="replace")]
