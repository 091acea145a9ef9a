"""Kinds of characters in all scripts: letters that form words, letters that are read one by one,
and marks that belong to a letter.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator

# Scripts that put no spaces between words: Han, Kana, Bopomofo, Yi, and those of line-breaking
# class SA (Unicode annex 14).
_UNSPACED = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x1950, 0x19DF),
    (0x1A20, 0x1AAF),
    (0x2E80, 0x2FDF),
    (0x3005, 0x3007),
    (0x3021, 0x3029),
    (0x3031, 0x303C),
    (0x3041, 0x312F),
    (0x31A0, 0x31BF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0xA4CF),
    (0xA9E0, 0xA9FF),
    (0xAA60, 0xAADF),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9D),
    (0x11700, 0x1174F),
    (0x1AFF0, 0x1B16F),
    (0x20000, 0x3FFFF),
)
_FIRST = [first for first, _ in _UNSPACED]
# without a width or of half a width, they change the letter before them
_JOINERS = "\u200c\u200d\uff9e\uff9f"
_MOST_KEPT = 20_000


def _kind(code: int) -> str:
    letter = chr(code)
    category = unicodedata.category(letter)
    if category[0] == "M" or letter in _JOINERS:
        return "m"
    if category[0] == "L" or category == "Nl":
        found = bisect_right(_FIRST, code) - 1
        return "o" if found >= 0 and code <= _UNSPACED[found][1] else "w"
    if letter in "_'’":
        return "_" if letter == "_" else "'"
    return "w" if letter.isalnum() else " " if letter.isspace() else "."


class _Kinds(dict[int, str]):
    def __missing__(self, code: int) -> str:
        kind = _kind(code)
        if len(self) < _MOST_KEPT:
            self[code] = kind
        return kind


_KINDS = _Kinds()


def kinds(text: str) -> str:
    """Return the kind of each character of a text, as a text of the same length.

    w: a letter of a word, or a digit; o: a letter of a script without spaces; m: a mark on the
    letter before it; _: an underscore; ': an apostrophe; a space: white space; a dot: any other.
    """
    return text.translate(_KINDS)


def spans(text: str, pattern: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """Yield the start and end of each part of a text whose `kinds` match the pattern.

    The time taken is proportional to the length of the text.
    """
    return (found.span() for found in pattern.finditer(kinds(text)))
