"""The destination of decoded pixels while a source is indexed: the cache, memory, or nowhere."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfumato.data.array_cache import ArrayCache, RowReader, Writer
from sfumato.data.data_config import DataConfig
from sfumato.data.decoding import Decoded, PixelFormat, Pixels, RejectedImage, decode, quiet
from sfumato.data.files import may_pass
from sfumato.data.index_store import KnownKeys
from sfumato.data.listing import Blob
from sfumato.data.remote import note_signs
from sfumato.data.segment_records import KEY, key_of
from sfumato.data.source_state import Identities
from sfumato.data.thumbnails import thumbnail
from sfumato.storage.cache_folder import cache_folder

DECODER = 2  # raised when the same bytes come to give other pixels
CACHE_SHARE_OF_DISK = 0.25
FACTS_AT_ONCE = 1 << 16  # of records that are parsed together
COMMIT_EVERY = 20_000
Rows = Callable[[NDArray[np.int64]], NDArray[Any]]  # arrays (n, ...) at positions
Add = Callable[[str, Mapping[str, Any], Mapping[str, NDArray[Any]]], None]


@dataclass(frozen=True, slots=True)
class _ReadImage:
    """One image as read: the key of its bytes, and what the decoder returned unless the cache has
    it; the number by which its bytes are known without being read; and whether reading has failed for
    a reason that may pass.
    """

    key: str
    identity: int | None = None
    decoded: Decoded | None = None
    thumbnail: NDArray[Any] | None = None
    reject: str | None = None
    failed: bool = False


def _read_image(blob: Blob, store: PixelStore) -> _ReadImage:
    identity = store.identities_of.of(blob)
    known = store.known.of(identity)
    if known is not None and store.holds(known):
        return _ReadImage(known, identity)
    try:
        data = blob.read()
    except (RejectedImage, OSError) as error:
        return _ReadImage("", reject=str(error), failed=may_pass(error))
    key = key_of(data)
    if store.holds(key):
        return _ReadImage(key, identity)
    try:
        decoded = decode(data, store.form, identify=True)
    except RejectedImage as error:
        return _ReadImage(key, reject=str(error))
    return _ReadImage(key, identity, decoded, thumbnail(decoded.pixels))


@dataclass
class ReadPart:
    """What was read of some images, in their order.

    Attributes:
        keys: hashes of their bytes, (n,).
        identities: see `Identities`; 0 where the file system says too little, (n,).
        rejects: why one cannot be used, by its position.
        failed: whether one could not be read for a reason that may pass.
        count: how many were read; the others follow them.
    """

    keys: NDArray[np.bytes_]
    identities: NDArray[np.int64]
    rejects: dict[int, str] = field(default_factory=dict)
    failed: bool = False
    count: int = 0

    @classmethod
    def empty(cls, count: int) -> ReadPart:
        """Return one of `count` images that are still to be read."""
        return cls(np.zeros(count, KEY), np.zeros(count, np.int64))

    def add(self, image: _ReadImage) -> None:
        """Take the next image."""
        if image.reject is not None:
            self.rejects[self.count] = image.reject
            self.failed |= image.failed
        else:
            self.keys[self.count] = bytes.fromhex(image.key)
            self.identities[self.count] = image.identity or 0
        self.count += 1

    def insert(self, begin: int, part: ReadPart) -> None:
        """Take a part, whose first image is number `begin`."""
        span = slice(begin, begin + part.count)
        self.keys[span], self.identities[span] = (
            part.keys[: part.count],
            part.identities[: part.count],
        )
        self.rejects |= {begin + place: reason for place, reason in part.rejects.items()}
        self.failed |= part.failed
        self.count += part.count

    @property
    def good(self) -> NDArray[np.int64]:
        """The positions of the images that can be used."""
        is_good = np.ones(len(self.keys), bool)
        is_good[list(self.rejects)] = False
        return np.flatnonzero(is_good)

    def known(self) -> tuple[NDArray[np.bytes_], NDArray[np.int64]]:
        """Return the keys and identities of the images that need not be read again."""
        known = self.identities != 0
        return self.keys[known], self.identities[known]


def read_part(
    blobs: Sequence[Blob],
    store: PixelStore,
    part: ReadPart,
    *,
    goes_on: Callable[[], bool],
    map_: Callable[[Callable[[Blob], _ReadImage], Sequence[Blob]], Iterator[_ReadImage]] = map,
) -> ReadPart:
    """Read images, and store what is decoded, also when the rest is interrupted.

    Args:
        part: takes what is read.
        goes_on: is called after each image; where it returns False, the others are left.
        map_: reads them, in order.
    """
    with store.adding() as add:
        for image in map_(partial(_read_image, store=store), blobs):
            part.add(image)
            if image.decoded is not None and image.thumbnail is not None:
                arrays = {"pixels": image.decoded.pixels, "thumbnail": image.thumbnail}
                add(image.key, _facts(image.decoded), arrays)
            if not goes_on():
                break
    return part


def _facts(decoded: Decoded) -> dict[str, Any]:
    facts = {
        "id": decoded.id,
        "shape": decoded.shape,
        "size": list(decoded.size),
        "notes": list(decoded.notes),
    }
    return facts | ({"frames": decoded.frames} if decoded.frames > 1 else {})


@dataclass(frozen=True)
class PartTask:
    """A part of a source, for a worker anywhere that has the same cache.

    Attributes:
        blobs: its images.
        form: the format that they are decoded to.
        cache: the folder of the decoded images.
        signs: the versions of remote files that are read, by address.
    """

    blobs: Sequence[Blob]
    form: PixelFormat
    cache: str
    signs: Mapping[str, str] = field(default_factory=dict)

    def read(self) -> ReadPart:
        """Read the images, and add those to the cache that it lacks."""
        note_signs(self.signs)
        cache = _cache_at(self.cache)
        cache.refresh()
        store = CachedPixels(self.form, KnownKeys(), cache)
        with quiet():
            part = ReadPart.empty(len(self.blobs))
            return read_part(self.blobs, store, part, goes_on=lambda: True)


@lru_cache(maxsize=4)
def _cache_at(folder: str) -> ArrayCache:
    """Open a cache, once for each process."""
    return ArrayCache.at(Path(folder))


class PixelStore(ABC):
    """The destination of decoded pixels while a source is indexed: cache, memory, or nowhere.

    Attributes:
        form: the format of the pixels.
        known: the keys of images that need not be read again.
        keeps_pixels: whether pixels are kept, on disk or in memory.
        is_on_disk: whether other processes can add to it.
    """

    keeps_pixels: bool
    is_on_disk: bool

    def __init__(self, form: PixelFormat, known: KnownKeys) -> None:
        self.form, self.known = form, known
        self.identities_of = Identities()

    @abstractmethod
    def holds(self, key: str) -> bool:
        """Return whether the image whose bytes have the hash `key` need not be decoded again."""

    @abstractmethod
    def adding(self) -> Any:
        """Return a context that gives what adds an image; in its end all is stored."""

    @abstractmethod
    def refresh(self) -> None:
        """Find what other processes have added."""

    @abstractmethod
    def facts(self, keys: NDArray[np.bytes_]) -> Iterator[dict[str, Any]]:
        """Yield the facts about images."""

    @abstractmethod
    def readers(self, keys: NDArray[np.bytes_]) -> tuple[Rows | None, Rows]:
        """Return two functions of positions, one that gathers pixels and one that reads thumbnails.

        The first is None if no pixels were kept; thumbnails are (n, 32, 32, 3).
        """


class CachedPixels(PixelStore):
    """Pixels in the cache."""

    keeps_pixels = is_on_disk = True

    def __init__(self, form: PixelFormat, known: KnownKeys, cache: ArrayCache) -> None:
        super().__init__(form, known)
        self.cache = cache

    def holds(self, key: str) -> bool:
        """Return whether the cache has the image."""
        return key in self.cache.records

    @contextmanager
    def adding(self) -> Iterator[Add]:
        """Give what adds an image to a segment, which is committed in the end."""
        writer = Writer(self.cache)

        def add(key: str, facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
            nonlocal writer
            if key in writer:
                return
            writer.add(key, facts, arrays)
            if len(writer) >= COMMIT_EVERY:  # what is decoded stays, if the rest is interrupted
                writer.commit()
                writer = Writer(self.cache)

        try:
            yield add
        finally:
            writer.commit()

    def refresh(self) -> None:
        """Find what other processes have added."""
        self.cache.refresh()

    def missing(self, keys: NDArray[np.bytes_]) -> int:
        """Return how many of some images the cache does not have."""
        return int((self.cache.records.find(keys)[0] < 0).sum())

    def facts(self, keys: NDArray[np.bytes_]) -> Iterator[dict[str, Any]]:
        """Yield the facts about images."""
        for begin in range(0, len(keys), FACTS_AT_ONCE):
            yield from self.cache.records.facts(keys[begin : begin + FACTS_AT_ONCE])

    def readers(self, keys: NDArray[np.bytes_]) -> tuple[Rows, Rows]:
        """Return readers of pixels and thumbnails."""
        pixels, thumbnails = (
            RowReader.of(self.cache, keys, name) for name in ("pixels", "thumbnail")
        )
        return pixels, thumbnails


class PixelsInMemory(PixelStore):
    """Pixels in memory, or nowhere; thumbnails and facts in any case."""

    is_on_disk = False

    def __init__(self, form: PixelFormat, known: KnownKeys, *, keeps_pixels: bool) -> None:
        super().__init__(form, known)
        self.keeps_pixels = keeps_pixels
        self._facts: list[dict[str, Any]] = []
        self._pixels: list[Pixels] = []
        self._thumbnails: list[NDArray[Any]] = []

    def holds(self, key: str) -> bool:
        """Return False: each image is decoded, also where two have the same bytes."""
        return False

    @contextmanager
    def adding(self) -> Iterator[Add]:
        """Give what keeps an image."""
        yield self._add

    def _add(self, key: str, facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        self._facts.append(dict(facts))
        self._thumbnails.append(arrays["thumbnail"])
        if self.keeps_pixels:
            self._pixels.append(arrays["pixels"])

    def refresh(self) -> None:
        """Do nothing: no other process adds anything."""

    def facts(self, keys: NDArray[np.bytes_]) -> Iterator[dict[str, Any]]:
        """Yield the facts about all images, in their order."""
        yield from self._facts

    def readers(self, keys: NDArray[np.bytes_]) -> tuple[Rows | None, Rows]:
        """Return readers of all images, in their order."""
        return _InMemory(self._pixels) if self.keeps_pixels else None, self._thumbnails_at

    def _thumbnails_at(self, positions: NDArray[np.int64]) -> NDArray[Any]:
        like = self._thumbnails[0]
        found = [self._thumbnails[position] for position in positions]
        return np.array(found, like.dtype).reshape(-1, *like.shape)


class _InMemory:
    """The pixels of every image, those of one shape in one array."""

    def __init__(self, pixels: list[Pixels]) -> None:
        self.row = np.empty(len(pixels), np.int64)
        self.arrays: dict[tuple[int, ...], Pixels] = {}
        self.shapes = [image.shape for image in pixels]
        for shape in set(self.shapes):
            places = [i for i, other in enumerate(self.shapes) if other == shape]
            self.row[places] = np.arange(len(places))
            self.arrays[shape] = np.stack([pixels[i] for i in places])

    def __call__(self, positions: NDArray[np.int64]) -> Pixels:
        if not len(positions):
            return next(iter(self.arrays.values()))[:0]
        return self.arrays[self.shapes[positions[0]]][self.row[positions]]


def pixel_store(config: DataConfig, form: PixelFormat, count: int, known: KnownKeys) -> PixelStore:
    """Return where the pixels of `count` images of a format are put."""
    height, width = max(form.shapes, key=lambda shape: shape[0] * shape[1])
    size = form.channels * height * width * form.bits // 8
    cache = _cache(form, count, size) if config.cache == "auto" else None
    if cache is not None:
        return CachedPixels(form, known, cache)
    return PixelsInMemory(form, known, keeps_pixels=count * size <= config.memory_gib * 2**30)


def _cache(form: PixelFormat, count: int, size: int) -> ArrayCache | None:
    """Open the cache of a pixel format; None if it cannot be written to or lacks room.

    It needs room for `count` images of `size` bytes, less those it holds already.
    """
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        cache = ArrayCache.open("pixels", f"decoder {DECODER} {form!r}")
        missing = max(0, count - len(cache.records)) * size
        if missing > CACHE_SHARE_OF_DISK * shutil.disk_usage(cache_folder()).free:
            return None
        Writer(cache).discard()
    except OSError:
        return None
    return cache
