"""Samples as a source lists them: their names, where their bytes are, and what is known about them.
Nothing is decoded here.
"""

from __future__ import annotations

import contextlib
import json
import lzma
import math
import os
import re
import stat
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from sfumato.config import Extensible
from sfumato.data import files
from sfumato.data.split_names import HELD_OUT, split_of
from sfumato.platform import read_at

MAX_BYTES = 256 << 20  # of one image
MAX_ATTRIBUTES = 1024  # of one image
MAX_TEXT_CHARACTERS = 1 << 20  # of the captions of one image


class Blob(Protocol):
    """Bytes somewhere. A blob is small, hashable and sent to worker processes, so it holds a place
    and not an open file.
    """

    def read(self) -> bytes:
        """Read the bytes, at most MAX_BYTES + 1, so that `decode` can reject what is too large.

        Raises:
            OSError: if they are gone.
        """
        ...


def read(path: str, offset: int, most: int) -> bytes:
    """Read up to `most` bytes of a file from `offset` on; reserve no more than the file holds."""
    try:
        return _read(path, offset, most)
    except OSError as error:
        files.note_failure(error)
        raise


def _read(path: str, offset: int, most: int) -> bytes:
    handle = _open(path)
    try:
        size = min(most, os.fstat(handle).st_size - offset)
        data = read_at(handle, size, offset) if size > 0 else b""
        while len(data) < size and (more := read_at(handle, size - len(data), offset + len(data))):
            data += more  # a signal cut the reading short
        return data
    finally:
        os.close(handle)


def _open(path: str) -> int:
    if not files.is_url(path):
        # a pipe that nobody writes to would never be opened otherwise
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError(f"{path} is a folder, pipe or device, not a file")
        return handle
    for _ in range(3):  # what is fetched may have to make room before it is opened
        place = files.local(path)
        with contextlib.suppress(FileNotFoundError):
            return os.open(place, os.O_RDONLY)
    return os.open(place, os.O_RDONLY)


@dataclass(frozen=True, slots=True)
class Inline:
    """Bytes in memory."""

    data: bytes

    def read(self) -> bytes:
        """Return the bytes in memory."""
        return self.data


@dataclass(frozen=True, slots=True)
class File:
    """A whole file, on this machine or behind a URL."""

    path: str

    def read(self) -> bytes:
        """Read the file, at most MAX_BYTES + 1 bytes of it."""
        return read(self.path, 0, MAX_BYTES + 1)


@dataclass(frozen=True, slots=True)
class Slice:
    """A range of a larger file: a member of a tar or of an uncompressed zip."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Read the range, at most MAX_BYTES + 1 bytes of it.

        Raises:
            OSError: if the file is gone or truncated.
        """
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
        """Decompress the member, at most MAX_BYTES + 1 bytes of it.

        Raises:
            OSError: if the archive is gone, or the member cannot be unpacked.
        """
        try:
            with _open_zip(self.path, files.version(self.path), os.getpid()).open(
                self.name
            ) as file:
                return file.read(MAX_BYTES + 1)
        except OSError as error:
            files.note_failure(error)
            raise
        except DAMAGED_ZIP as error:
            raise OSError(f"cannot be unpacked: {error}") from None


# What `zipfile` raises on what is no zip, beside OSError.
DAMAGED_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    ValueError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    EOFError,
)


@lru_cache(maxsize=4)
def _open_zip(path: str, version: tuple[int | str, ...], process: int) -> zipfile.ZipFile:
    """Open an archive, once for each version of the file and each process.

    Forked processes would otherwise share the position in the file.
    """
    return zipfile.ZipFile(files.local(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One sample.

    Attributes:
        name: for people, unique in its source; in a folder the path below it.
        image: the encoded image.
        category: None where the source has none.
        captions: any number of texts.
        attributes: numbers by name, sorted; 1 for a label of which several may hold.
        doodle, mask: encoded images that lie over the image: a line drawing; white where the image
            counts.
        points: an encoded point cloud.
        holdout: name of a set that is kept from training as a whole, such as a combination nobody
            trains on.
        group: entries of one group are never split over training and hold-out; None where the entry
            stands for itself.
        repeats: how often it is seen in training, beside the other entries' repeats.
    """

    name: str
    image: Blob
    category: str | None = None
    captions: tuple[str, ...] = ()
    attributes: tuple[tuple[str, float], ...] = ()
    doodle: Blob | None = None
    mask: Blob | None = None
    points: Blob | None = None
    holdout: str | None = None
    group: str | None = None
    repeats: int = 1


def values(entries: Sequence[Entry], name: str) -> Sequence[Any]:
    """Return one field of all entries, without making them where it is a column of its own."""
    column = getattr(entries, "values", None)
    found: Sequence[Any] = (
        [getattr(entry, name) for entry in entries] if column is None else column(name)
    )
    return found


def integers(entries: Sequence[Entry], name: str) -> NDArray[np.integer]:
    """Return one field of all entries, (n,), which is read from disk where it is a column of its own."""
    column = getattr(entries, "integers", None)
    found: NDArray[np.integer] = (
        np.array(values(entries, name), np.int64) if column is None else column(name)
    )
    return found


def select(entries: Sequence[Entry], positions: NDArray[np.int64]) -> Sequence[Entry]:
    """Return the entries at some positions, in their order."""
    if len(positions) == len(entries):
        return entries
    take = getattr(entries, "take", None)
    if take is None:
        return [entries[position] for position in positions.tolist()]
    taken: Sequence[Entry] = take(positions)
    return taken


def containers(entries: Sequence[Entry]) -> NDArray[np.int64]:
    """Return a number for the file that holds each image, (n,); -1 where there is none to be named."""
    of_table = getattr(entries, "containers", None)
    if of_table is not None:
        found: NDArray[np.int64] = of_table()
        return found
    numbers: dict[str, int] = {}
    paths = [path_of(entry.image) for entry in entries]
    return np.array(
        [-1 if path is None else numbers.setdefault(path, len(numbers)) for path in paths], np.int64
    )


def path_of(blob: Blob) -> str | None:
    """Return the file that holds a blob's bytes; None if there is none."""
    path: str | None = getattr(getattr(blob, "file", blob), "path", None)
    return path


def value_at(entries: Sequence[Entry], name: str, position: int) -> Any:
    """Return one field of one entry, without the others where it is a column of its own."""
    column = getattr(entries, "value", None)
    return getattr(entries[position], name) if column is None else column(name, position)


@dataclass(frozen=True)
class Reject:
    """Something left out, and why.

    Attributes:
        part: whether it is a part of something that is counted by itself, such as a row of a
            metadata file.
    """

    name: str
    reason: str
    part: bool = False


class SourceState(NamedTuple):
    """The state of a source: a hash of its settings and of what is known of its files, and the
    newest time of change among them, in ns.
    """

    hash: str
    newest_ns: int


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a source holds, in an order that does not depend on the machine.

    Attributes:
        entries: the images.
        rejects: what was left out already.
        sidecars: files that say something about images, counted by kind, such as {"captions": 40,
            "metadata": 1}.
        unit: what `total` counts.
        total: all that there is; -1 stands for what the entries and rejects come to.
        remarks: how it was read, in whole sentences, where a person might expect something else.
        state: that of its source, if nothing has changed while it was listed.
    """

    entries: Sequence[Entry]
    rejects: list[Reject] = field(default_factory=list)
    sidecars: dict[str, int] = field(default_factory=dict)
    unit: str = "files"
    total: int = -1
    remarks: tuple[str, ...] = ()
    state: SourceState | None = None

    def __post_init__(self) -> None:
        if self.total < 0:
            count = (
                len(self.entries)
                + sum(self.sidecars.values())
                + sum(not reject.part for reject in self.rejects)
            )
            object.__setattr__(self, "total", count)


class Source(Extensible, ABC):
    """A place that images come from. Every frozen dataclass that derives from it is a kind of
    source.

    Attributes:
        is_of_files: whether its listing follows from its settings and from the files at `path`
            alone; it is then kept, and used again while the file system says that they are the same.
    """

    is_of_files: ClassVar[bool] = False

    @abstractmethod
    def listing(self) -> Listing:
        """List all samples.

        Raises:
            DataError: if the source is missing, damaged as a whole, or empty.
        """


# By the names that people use for them, in metadata files, JSON sidecars and table columns; the
# first one found counts.
CAPTION_KEYS = (
    "captions",
    "caption",
    "text",
    "texts",
    "prompt",
    "prompts",
    "description",
    "caption_text",
    "sentence",
    "sentences",
    "alt_text",
    "alt",
)
CATEGORY_KEYS = (
    "category",
    "label",
    "class",
    "cls",
    "fine_label",
    "categories",
    "labels",
    "class_name",
    "category_name",
    "label_name",
)
HOLDOUT_KEYS = ("holdout",)
SPLIT_KEYS = ("split", "subset", "partition")
REPEATS_KEY, MAX_REPEATS = "num_repeats", 999  # kohya's; larger numbers are years and dates
KNOWN_KEYS = {
    *CAPTION_KEYS,
    *CATEGORY_KEYS,
    *HOLDOUT_KEYS,
    *SPLIT_KEYS,
    REPEATS_KEY,
    "attributes",
    "tags",
}


def is_known_column(column: str) -> bool:
    """Return whether `parse_annotations` reads a column."""
    return normalized_key(column) in KNOWN_KEYS or column.startswith("attributes.")


def normalized_key(key: str) -> str:
    """Normalize a column's name for comparison: `Caption`, ` caption` and `caption` are equal."""
    return re.sub(r"[\s-]+", "_", key.strip().lower())


def parse_annotations(record: dict[str, Any]) -> dict[str, Any]:
    """Read captions, category, hold-out, repeats and attributes from a JSON object or table row.

    They are returned as fields of an `Entry`; what is not given is left out.

    Raises:
        ValueError: if the captions have more than MAX_TEXT_CHARACTERS characters.
    """
    fields = {normalized_key(key): value for key, value in reversed(record.items())} | record

    def first(keys: tuple[str, ...]) -> Any:
        return next((fields[key] for key in keys if fields.get(key) is not None), None)

    captions, category, holdout, split = (
        first(CAPTION_KEYS),
        first(CATEGORY_KEYS),
        first(HOLDOUT_KEYS),
        first(SPLIT_KEYS),
    )
    texts = captions if isinstance(captions, list | tuple) else [captions]
    cleaned = [_encodable(str(text)).strip() for text in texts if isinstance(text, str | int)]
    if sum(map(len, cleaned)) > MAX_TEXT_CHARACTERS:
        raise ValueError(f"text of more than {MAX_TEXT_CHARACTERS >> 10} KiB")
    annotations: dict[str, Any] = {"captions": tuple(filter(None, cleaned))} if any(cleaned) else {}
    if isinstance(category, float) and category.is_integer():
        category = int(category)  # as a column of whole numbers with gaps is stored
    if isinstance(category, str | int) and str(category):
        annotations["category"] = printable_name(str(category))
    if isinstance(holdout, str) and holdout:
        annotations["holdout"] = printable_name(holdout)
    elif isinstance(split, str) and split_of(split) == HELD_OUT:
        annotations["holdout"] = printable_name(split)
    repeats = fields.get(REPEATS_KEY)
    if isinstance(repeats, int | float) and repeats in range(1, MAX_REPEATS + 1):
        annotations["repeats"] = int(repeats)
    if attributes := _attributes(record):
        annotations["attributes"] = attributes
    return annotations


def _attributes(record: dict[str, Any]) -> tuple[tuple[str, float], ...]:
    """Read attributes from `attributes: {"age": 7}`, columns `attributes.age`, and `tags`.

    Tags are `["cat", "asleep"]` or "cat, asleep"; each of them is an attribute of value 1.
    """
    values, tags = record.get("attributes"), record.get("tags")
    if isinstance(values, str):  # as a table keeps it
        with contextlib.suppress(ValueError, RecursionError):
            values = json.loads(values)
    numbers = (
        {str(name): value for name, value in values.items()} if isinstance(values, dict) else {}
    )
    numbers |= {
        name.removeprefix("attributes."): value
        for name, value in record.items()
        if name.startswith("attributes.")
    }
    words = (
        tags.split(",") if isinstance(tags, str) else tags if isinstance(tags, list | tuple) else []
    )
    numbers |= {word.strip(): 1.0 for word in words if isinstance(word, str) and word.strip()}
    attributes = {}
    for name, value in numbers.items():
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            if math.isfinite(number := float(value)):
                attributes[printable_name(name)] = number
    return tuple(sorted(attributes.items())[:MAX_ATTRIBUTES])


def printable_name(name: str) -> str:
    """Escape a name so that it can be printed on one line and written as UTF-8.

    File systems, archives and JSON allow names that cannot.
    """
    return _encodable(
        files.UNPRINTABLE.sub(lambda match: match.group().encode("unicode_escape").decode(), name)
    )


def _encodable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()
