"""Decoding of texts of unknown encoding. Unicode is recognized text by text; for all others of a
set one encoding is guessed, and reported.

This is the only module that uses charset-normalizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_TEXT_BYTES = 1 << 20  # of one file with a caption, or with its JSON
GUESSED_FROM_BYTES = 64 << 10  # of a set's texts
TOO_FEW_BYTES, FEW_BYTES = 4, 8  # outside ASCII, that tell nothing of the encoding, or little
WESTERN = ("cp1252", "cp1250")  # in order of preference, where letters alone do not decide
LATIN = frozenset(
    {
        "cp1252",
        "cp1250",
        "latin_1",
        "iso8859_2",
        "iso8859_15",
        "iso8859_16",
        "iso8859_10",
        "iso8859_14",
        "mac_latin2",
    }
)
COMMON_BLOCKS = (
    ("\t", "~"),
    ("\xa0", "\u06ff"),
    ("\u0900", "\u0e7f"),
    ("\u3000", "\u9fff"),
    ("\uac00", "\ud7a3"),
    ("\uff00", "\uffef"),
)
MARKS = (
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)


@dataclass
class Texts:
    """The texts of a set by name: add all of them, call `settle`, then look them up."""

    _texts: dict[str, str] = field(default_factory=dict)
    _raw: dict[str, bytes] = field(default_factory=dict)
    note: str = ""

    def add(self, name: str, data: bytes, *, limit: int = MAX_TEXT_BYTES) -> None:
        """Add one text.

        Raises:
            ValueError: if it is longer than `limit` bytes.
        """
        text = unicode_text(data, limit=limit)
        if text is None:
            self._raw[name] = data
        else:
            self._texts[name] = text

    def settle(self) -> None:
        """Decode all texts that are not Unicode with one guessed encoding.

        `note` then says which one, and for how many texts.
        """
        if not self._raw:
            return
        encoding = guess_encoding(self._raw)
        damaged = 0
        for name, data in self._raw.items():
            self._texts[name] = text = data.decode(encoding, errors="replace")
            damaged += "\N{REPLACEMENT CHARACTER}" in text
        note = f"{len(self._raw)} of {len(self._texts)} texts are not Unicode and were read as {encoding}, which is a guess"
        self.note = note + (
            f"; {damaged} of them contain bytes that are invalid in it" if damaged else ""
        )
        self._raw.clear()

    def __getitem__(self, name: str) -> str:
        return self._texts[name]

    def __contains__(self, name: str) -> bool:
        return name in self._texts


def unicode_text(data: bytes, *, limit: int = MAX_TEXT_BYTES) -> str | None:
    """Decode text in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark; None for other text.

    Raises:
        ValueError: if it is longer than `limit` bytes.
    """
    if len(data) > limit:
        raise ValueError(f"text of more than {limit >> 10} KiB")
    for mark, encoding in MARKS:
        if data.startswith(mark):
            return data.decode(encoding, errors="replace")
    if b"\0" in data:  # valid UTF-8, and yet UTF-16 without a mark
        return None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def decode_text(data: bytes, *, limit: int = MAX_TEXT_BYTES) -> str:
    """Decode one text by itself, in whatever encoding it is.

    Raises:
        ValueError: if it is longer than `limit` bytes.
    """
    text = unicode_text(data, limit=limit)
    return text if text is not None else data.decode(guess_encoding({"": data}), errors="replace")


def guess_encoding(raw: Mapping[str, bytes]) -> str:
    """Return the one encoding that byte strings, none of them UTF-8, are most likely in."""
    wide = _utf16_order(raw)
    if wide:
        return wide
    chosen: list[bytes] = []
    size = 0
    for data in raw.values():
        chosen.append(data)
        size += len(data) + 1
        if size > GUESSED_FROM_BYTES:
            break
    sample = b"\n".join(chosen)[:GUESSED_FROM_BYTES]
    western = _western_encoding(sample)
    beyond = sum(byte > 127 for byte in sample)
    if beyond < TOO_FEW_BYTES or (beyond < FEW_BYTES and western is not None):
        return western or WESTERN[0]
    from charset_normalizer import from_bytes

    best = from_bytes(sample).best()
    if best is None or best.encoding == "utf_8" or best.encoding in LATIN:
        return western or WESTERN[0]
    return best.encoding


def _utf16_order(raw: Mapping[str, bytes]) -> str:
    """Return the byte order of UTF-16 without a mark; "" if there are no zero bytes.

    Of the two orders, it is the one that gives more letters of common blocks.
    """
    if not any(b"\0" in data for data in raw.values()):
        return ""
    return max(
        ("utf-16-le", "utf-16-be"),
        key=lambda encoding: sum(_count_common_letters(data, encoding) for data in raw.values()),
    )


def _count_common_letters(data: bytes, encoding: str) -> int:
    """Count the letters in blocks that people write in.

    Bytes in the wrong order give letters that are spread over all of Unicode.
    """
    text = data[:GUESSED_FROM_BYTES].decode(encoding, errors="replace")
    return sum(any(low <= letter <= high for low, high in COMMON_BLOCKS) for letter in text)


def _western_encoding(sample: bytes) -> str | None:
    """Return the first Latin code page in which all of the sample beyond ASCII makes sense.

    Letters, quotation marks, dashes and a few other signs do. None if there is none.
    """
    for encoding in WESTERN:
        beyond = [letter for letter in sample.decode(encoding, errors="replace") if letter > "\x7f"]
        if all(
            (letter.isalpha() and letter not in "ªº") or letter in "‘’“”–—…«»°€"
            for letter in beyond
        ):
            return encoding
    return None
