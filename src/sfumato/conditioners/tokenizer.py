"""Texts as token ids, with a vocabulary fitted to the captions: one token for a known word, bytes for
anything else.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from sfumato import unicode_scripts

# special token ids; a byte b is BYTES + b, then come the words
PAD, START, EMPTY, BYTES = 0, 1, 2, 3
FIRST_WORD = BYTES + 256
MOST_WORDS = 50_000  # of a dataset that are stored
_RUN = re.compile(r"\w+|[^\w\s]")
_WORD = re.compile(r"[w_][w_m]*|om*|[.'m]")  # of `unicode_scripts.kinds`


@dataclass(frozen=True)
class ByScript:
    """Words where the script puts spaces between them, single letters where it does not; marks stay
    with their letters.
    """

    def normalize(self, text: str) -> str:
        """Fold compatibility forms and case; composed and decomposed letters become the same."""
        if text.isascii():
            return text.lower()
        return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())

    def pieces(self, text: str) -> list[str]:
        """Split a text into words and signs, normalized."""
        plain = self.normalize(text)
        if plain.isascii():  # where both patterns match the same
            return _RUN.findall(plain)
        return [plain[first:last] for first, last in unicode_scripts.spans(plain, _WORD)]

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield where words and signs begin and end in the text as given."""
        return unicode_scripts.spans(text, _WORD)


@dataclass(frozen=True)
class ByRuns:
    """Runs of letters in any script, with marks as separate signs, as in runs that were trained
    before `ByScript`.
    """

    def normalize(self, text: str) -> str:
        """Fold compatibility forms and case."""
        return unicodedata.normalize("NFKC", text).casefold()

    def pieces(self, text: str) -> list[str]:
        """Split a text into words and signs, normalized."""
        return _RUN.findall(self.normalize(text))

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield where words and signs begin and end in the text as given."""
        return (match.span() for match in _RUN.finditer(text))


Splitting = ByScript | ByRuns


@dataclass(frozen=True)
class WordTokenizer:
    """A tokenizer that can encode any text in any script; case and width of letters do not matter.

    Attributes:
        vocabulary: the words that have a token of their own.
        splitting: how texts are split into words.
    """

    vocabulary: tuple[str, ...]
    splitting: Splitting = ByScript()
    _numbers: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "_numbers", {word: FIRST_WORD + i for i, word in enumerate(self.vocabulary)}
        )

    @classmethod
    def fit(
        cls, captions: Iterable[str], *, most: int, splitting: Splitting = ByScript()
    ) -> WordTokenizer:
        """Return a tokenizer of the `most` most frequent words of the captions."""
        counts = Counter(piece for caption in captions for piece in splitting.pieces(caption))
        frequent = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(tuple(frequent[:most]), splitting)

    def __len__(self) -> int:
        return FIRST_WORD + len(self.vocabulary)

    def encode(self, text: str, *, length: int, spelled: int | None = None) -> list[int]:
        """Return the token ids of a text, `length` of them: START, the text truncated, then PAD.

        An empty text is EMPTY, then PAD.

        Args:
            spelled: number of a word that is spelled in bytes although it is known, where all of
                the text still fits.
        """
        pieces = self.splitting.pieces(text)
        numbers = self._of(pieces, length)
        if spelled is not None and spelled < len(pieces) and len(numbers) < length:
            around = self._of(pieces[:spelled], length), self._of(pieces[spelled + 1 :], length)
            longer = [*around[0], *_bytes(pieces[spelled]), *around[1]]
            numbers = longer if len(longer) < length else numbers
        if not numbers:
            return [EMPTY] + [PAD] * (length - 1)
        return ([START, *numbers] + [PAD] * length)[:length]

    def count(self, text: str) -> int:
        """Return the number of tokens of a text, START included."""
        return 1 + len(self._of(self.splitting.pieces(text)))

    def truncate(self, text: str, *, length: int) -> str:
        """Return the part of a text that `encode` does not truncate."""
        if self.count(text) <= length:
            return text
        end, room = 0, length - 1
        for first, last in self.splitting.spans(text):
            room -= len(self._of(self.splitting.pieces(text[first:last])))
            if room < 0:
                break
            end = last
        return text[:end]

    def _of(self, pieces: list[str], most: float = math.inf) -> list[int]:
        """Return the numbers of words and signs, up to the word that makes them `most` or more."""
        numbers: list[int] = []
        for piece in pieces:
            token_id = self._numbers.get(piece)
            if token_id is not None:
                numbers.append(token_id)
            else:
                numbers += _bytes(piece)
            if len(numbers) >= most:
                break
        return numbers


def _bytes(piece: str) -> list[int]:
    return [BYTES + byte for byte in piece.encode(errors="replace")]
