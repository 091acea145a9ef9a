"""One sample as a source lists it: its name, where its bytes are, and what is known about it. Nothing is decoded here."""

from __future__ import annotations

import os
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from sfumato.data import files

MAX_BYTES = 256 << 20  # of one picture
MAX_TEXT_BYTES = 1 << 20  # of one caption or its JSON


class Blob(Protocol):
    """Bytes somewhere; small, hashable and sent to worker processes, so it holds a place and no open file."""

    def read(self) -> bytes:
        """The bytes, at most MAX_BYTES + 1 of them: enough for `decode` to say that they are too many.

        Raises:
            OSError: if they are gone.
        """
        ...


def read(path: str, offset: int, most: int) -> bytes:
    """Up to `most` bytes of a file from `offset` on; nothing larger than the file is ever reserved for them."""
    handle = os.open(files.local(path) if "//" in path else path, os.O_RDONLY)
    try:
        size = min(most, os.fstat(handle).st_size - offset)
        data = os.pread(handle, size, offset) if size > 0 else b""
        while len(data) < size and (more := os.pread(handle, size - len(data), offset + len(data))):
            data += more  # a signal cut the reading short
        return data
    finally:
        os.close(handle)


@dataclass(frozen=True, slots=True)
class Inline:
    """Bytes at hand."""

    data: bytes

    def read(self) -> bytes:
        return self.data


@dataclass(frozen=True, slots=True)
class File:
    """A file of its own, on this machine or behind a URL."""

    path: str

    def read(self) -> bytes:
        return read(self.path, 0, MAX_BYTES + 1)


@dataclass(frozen=True, slots=True)
class Slice:
    """A stretch of a larger file: a member of a tar or of an uncompressed zip."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        data = read(self.path, self.offset, min(self.size, MAX_BYTES + 1))
        if len(data) < min(self.size, MAX_BYTES + 1):
            raise OSError(f"{self.path} is cut short")
        return data


@dataclass(frozen=True, slots=True)
class ZipMember:
    """A compressed member of a zip."""

    path: str
    name: str

    def read(self) -> bytes:
        try:
            with _open_zip(str(files.local(self.path))).open(self.name) as file:
                return file.read(MAX_BYTES + 1)
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
            raise OSError(f"cannot be unpacked: {error}") from None


@lru_cache(maxsize=4)
def _open_zip(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One sample.

    Attributes:
        name: for people, unique in its source; in a folder the path below it.
        image: the encoded picture.
        category: None where the source has none; "" for a picture beside the category folders, which is left out.
        captions: any number of texts.
        doodle, mask: encoded pictures that lie over the image: a line drawing; white where the image counts.
        points: an encoded point cloud.
        holdout: name of a set that is kept from training as a whole, such as a combination nobody trains on.
    """

    name: str
    image: Blob
    category: str | None = None
    captions: tuple[str, ...] = ()
    doodle: Blob | None = None
    mask: Blob | None = None
    points: Blob | None = None
    holdout: str | None = None


@dataclass(frozen=True)
class Reject:
    """A picture left out, and why."""

    name: str
    reason: str


class Listing(NamedTuple):
    """What a source holds: entries in an order that does not depend on the machine, and what it had to leave out already."""

    entries: list[Entry]
    rejects: list[Reject]


class Source(Protocol):
    """A frozen configuration that can list what it holds."""

    def listing(self) -> Listing:
        """All samples.

        Raises:
            DataError: if the source is missing, damaged as a whole, or holds nothing.
        """
        ...


# By the names that people use for them, in metadata files, JSON sidecars and table columns; the first one found counts.
CAPTION_KEYS = ("captions", "caption", "text", "texts", "prompt", "description")
CATEGORY_KEYS = ("category", "label", "class", "cls", "fine_label")
HOLDOUT_KEYS = ("holdout",)


def described(record: dict[str, Any]) -> dict[str, Any]:
    """The captions, category and hold-out of a JSON object or table row, as fields of an `Entry`."""

    def first(keys: tuple[str, ...]) -> Any:
        return next((record[key] for key in keys if record.get(key) is not None), None)

    captions, category, holdout = first(CAPTION_KEYS), first(CATEGORY_KEYS), first(HOLDOUT_KEYS)
    texts = captions if isinstance(captions, list | tuple) else [captions]
    found: dict[str, Any] = {"captions": tuple(str(text).strip() for text in texts if text is not None and str(text).strip())}
    if isinstance(category, str | int) and str(category):
        found["category"] = legible(str(category))
    if isinstance(holdout, str) and holdout:
        found["holdout"] = legible(holdout)
    return found


def legible(name: str) -> str:
    """A name that can be written as UTF-8; file systems and archives allow others."""
    return name.encode(errors="backslashreplace").decode()
