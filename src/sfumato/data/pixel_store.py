"""The destination of decoded pixels while a source is indexed: the cache, memory, or nowhere."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfumato.data.array_cache import ArrayCache, RowReader, Writer
from sfumato.data.dataset import DataConfig
from sfumato.data.decoding import Decoded, PixelFormat, Pixels, RejectedImage, decode
from sfumato.data.duplicates import thumbnail
from sfumato.data.files import cache_folder, may_pass
from sfumato.data.index_store import KnownKeys
from sfumato.data.listing import Blob, Entry
from sfumato.data.parallel import forked_map
from sfumato.data.source_state import Identities

DECODER = 2  # raised when the same bytes come to give other pixels
CACHE_SHARE_OF_DISK = 0.25
COMMIT_EVERY = 20_000
Rows = Callable[[NDArray[np.int64]], NDArray[Any]]  # arrays (n, ...) at positions


def read_images(
    entries: Sequence[Entry], store: PixelStore
) -> Iterator[tuple[Entry, dict[str, Any]]]:
    """Yield each entry with the facts about its image, in order."""
    images = forked_map(partial(_read_image, store=store), [entry.image for entry in entries])
    for entry, image in zip(entries, images, strict=True):
        yield entry, store.add(image)


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
    if known is not None and store.is_cached(known):
        return _ReadImage(known, identity)
    try:
        data = blob.read()
    except (RejectedImage, OSError) as error:
        return _ReadImage("", reject=str(error), failed=may_pass(error))
    key = hashlib.sha256(data).hexdigest()[:32]
    if store.is_cached(key):
        return _ReadImage(key, identity)
    try:
        decoded = decode(data, store.form, identify=True)
    except RejectedImage as error:
        return _ReadImage(key, reject=str(error))
    return _ReadImage(key, identity, decoded, thumbnail(decoded.pixels))


class PixelStore:
    """The destination of decoded pixels while a source is indexed: cache, memory, or nowhere.

    Attributes:
        known: the keys of images that need not be read again.
        keys, identities: of the images that were added.
        failed: whether any could not be read for a reason that may pass.
    """

    def __init__(
        self, form: PixelFormat, cache: ArrayCache | None, known: KnownKeys, *, in_memory: bool
    ) -> None:
        self.form, self.cache, self.known = form, cache, known
        self.identities_of = Identities()
        self._writer = None if cache is None else Writer(cache)
        self.keys: list[str] = []
        self.identities: list[int] = []
        self.failed = False
        self._pixels: list[Pixels] | None = [] if cache is None and in_memory else None
        self._thumbnails: list[NDArray[Any]] = []

    @property
    def keeps_pixels(self) -> bool:
        """Whether pixels are kept, on disk or in memory."""
        return self.cache is not None or self._pixels is not None

    def __enter__(self) -> None:
        """Enter the context."""

    def __exit__(self, *error: object) -> None:
        """Commit what is decoded, also when the rest is interrupted."""
        if self._writer is not None:
            self._writer.commit()

    def is_cached(self, key: str) -> bool:
        """Return whether the cache holds the image whose bytes have the hash `key`."""
        return self.cache is not None and key in self.cache.records

    def add(self, image: _ReadImage) -> dict[str, Any]:
        """Store one image; return its facts, or {"reject": reason}."""
        if image.reject is not None:
            self.failed |= image.failed
            return {"reject": image.reject}
        self.keys.append(image.key)
        self.identities.append(image.identity or 0)
        if image.decoded is None:
            assert self.cache is not None
            return dict(self.cache.records[image.key].facts)
        decoded, small = image.decoded, image.thumbnail
        assert small is not None
        facts = {
            "id": decoded.id,
            "shape": decoded.shape,
            "size": list(decoded.size),
            "notes": list(decoded.notes),
        }
        if decoded.frames > 1:
            facts["frames"] = decoded.frames
        if self._writer is not None and self.cache is not None:
            self._writer.add(image.key, facts, {"pixels": decoded.pixels, "thumbnail": small})
            # what is decoded stays, if the rest is interrupted
            if len(self._writer) >= COMMIT_EVERY:
                self._writer.commit()
                self._writer = Writer(self.cache)
        else:
            self._thumbnails.append(small)
            if self._pixels is not None:
                self._pixels.append(decoded.pixels)
        return facts

    def finish(
        self,
    ) -> tuple[Rows | None, Rows]:
        """Return two functions of positions, one that gathers pixels and one that reads thumbnails.

        The first is None if no pixels were kept; thumbnails are (n, 32, 32, 3).
        """
        if self.cache is not None:
            records = [self.cache.records[key] for key in self.keys]
            thumbnails = RowReader.of(
                self.cache, [record.arrays["thumbnail"] for record in records]
            )
            return RowReader.of(
                self.cache, [record.arrays["pixels"] for record in records]
            ), thumbnails
        return None if self._pixels is None else _InMemory(self._pixels), self._thumbnails_at

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
    return PixelStore(form, cache, known, in_memory=count * size <= config.memory_gib * 2**30)


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
