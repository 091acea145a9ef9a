"""A cache on disk of arrays made from samples, kept under the hash of what they were made from and
memory-mapped.

Every row has a check value (CRC-32), which is compared when the row is first read: a bit that has
flipped on the disk is found before anything is trained on it.

A key is the hash of a sample's bytes; a folder stands for the transform (and encoder) that made the
arrays. So an edited image is the only one that misses, a changed setting makes every image miss,
and nothing stale is ever found. Files are only ever added, one segment at a time, by one rename:
several processes may fill the same folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from sfumato.data.choice import choose_evenly
from sfumato.data.segment_records import DAMAGED, Line, Place, Records, Segment, write_records
from sfumato.errors import DataError
from sfumato.storage.atomic import atomic_file, commit, sweep, temporary_beside
from sfumato.storage.cache_folder import cache_folder

FORMAT = "3"


class DamagedRows(DataError):
    """Stored arrays that differ from what was written; `segment` is the folder of the first."""

    def __init__(self, count: int, segment: Path) -> None:
        self.segment = segment
        super().__init__(
            f"{count} stored array(s) differ from what was written (check value): a bit has "
            "flipped on the disk or in memory",
            where=str(segment),
            hint="run the command again: they are made again from the images; check the disk",
        )


@dataclass
class ArrayCache:
    """The records of one transform.

    Attributes:
        folder: its own.
        records: what is there, by key.
    """

    folder: Path
    records: Records = field(default_factory=Records)
    _known: set[str] = field(default_factory=set, repr=False)
    _maps: dict[str, NDArray[Any]] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # other processes map the files for themselves, and look nothing up
        return {**self.__dict__, "records": Records(), "_maps": {}}

    @classmethod
    def open(cls, kind: str, transform: str) -> ArrayCache:
        """Open the cache of `kind` ("pixels", "latents", ...) for a transform described as text."""
        name = hashlib.sha256(f"{FORMAT} {transform}".encode()).hexdigest()[:24]
        folder = cache_folder() / kind / name
        sweep(folder)
        return cls.at(folder)

    @classmethod
    def at(cls, folder: Path) -> ArrayCache:
        """Open the cache in a folder."""
        cache = cls(folder)
        cache.refresh()
        return cache

    def refresh(self) -> None:
        """Find what other processes have added."""
        for folder in sorted(self.folder.glob("segment-*")):
            if folder.name not in self._known:
                self.add(folder)

    def add(self, folder: Path) -> None:
        """Add the records of a segment; if it is damaged, its keys are missed, and made again."""
        self._known.add(folder.name)
        with contextlib.suppress(*DAMAGED):
            segment = Segment.open(folder)
            if all(len(self.map(file)) >= rows for file, rows in segment.longest().items()):
                self.records.add(segment)

    def map(self, file: str) -> NDArray[Any]:
        """Memory-map one file of arrays, (rows, ...); its shape and dtype are in its name."""
        dtype, *shape = file.rpartition("/")[2].removesuffix(".bin").split("-")[1].split("x")
        sizes = tuple(int(size) for size in shape)
        path = self.folder / file
        row = int(np.prod(sizes)) * np.dtype(dtype).itemsize
        return np.memmap(path, dtype=dtype, mode="r", shape=(path.stat().st_size // row, *sizes))

    def array(self, place: Place) -> NDArray[Any]:
        """Return a copy of one array.

        Raises:
            DamagedRows: see `damaged`.
        """
        if place.file not in self._maps:
            self._maps[place.file] = self.map(place.file)
        row = np.array(self._maps[place.file][place.row])
        if _check(row) != place.check:
            raise self.damaged([place.file])
        return row

    def damaged(self, file_names: Sequence[str]) -> DamagedRows:
        """Return the error for arrays in these files that differ from what was stored.

        The first one's segment is renamed, so that its keys are missed and made again by the next
        command.
        """
        segment = self.folder / file_names[0].partition("/")[0]
        with contextlib.suppress(OSError):  # another process was first
            segment.rename(segment.with_name(f"damaged-{segment.name}"))
        return DamagedRows(len(file_names), segment)

    def size_bytes(self) -> int:
        """Return the size of the cache's folder on disk."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


def verify_sample(kind: str, most: int) -> tuple[int, list[str]]:
    """Compare arrays of a kind of cache with their check values.

    Args:
        most: keys whose arrays are read, spread evenly over all that there are.
    Returns:
        how many were read, and the segments that have damaged ones.
    """
    keys = [
        (cache, key)
        for folder in sorted((cache_folder() / kind).glob("*"))
        for cache in [ArrayCache.at(folder)]
        for key in cache.records
    ]
    chosen = [keys[number] for number in choose_evenly(np.arange(len(keys)), most)]
    damaged, count = set(), 0
    for cache, key in chosen:
        for place in cache.records[key].arrays.values():
            count += 1
            if _check(np.array(cache.map(place.file)[place.row])) != place.check:
                damaged.add(str(cache.folder / place.file.partition("/")[0]))
    return count, sorted(damaged)


class Writer:
    """Adds one segment to a cache; none of it is visible before `commit`."""

    def __init__(self, cache: ArrayCache) -> None:
        self.cache = cache
        self.temporary = temporary_beside(cache.folder / "segment")
        self._files: dict[str, BinaryIO] = {}
        self._rows: dict[str, int] = {}
        self._lines: dict[str, Line] = {}
        self.temporary.mkdir(parents=True)

    def __len__(self) -> int:
        return len(self._lines)

    def __contains__(self, key: str) -> bool:
        return key in self._lines

    def add(self, key: str, facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Store `facts` and `arrays` under `key`."""
        places = {}
        for name, array in arrays.items():
            file = f"{name}-{'x'.join([array.dtype.str[1:], *map(str, array.shape)])}.bin"
            if file not in self._files:
                self._files[file], self._rows[file] = (self.temporary / file).open("wb"), 0
            data = np.ascontiguousarray(array)
            self._files[file].write(data.data)
            places[name] = (file, self._rows[file], _check(data))
            self._rows[file] += 1
        self._lines[key] = (key, facts, places)

    def commit(self) -> None:
        """Make the segment part of the cache; an empty one is discarded.

        Raises:
            DataError: if it cannot be written.
        """
        if not self._lines:
            self.discard()
            return
        try:
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
                file.close()
            write_records(self.temporary, list(self._lines.values()))
            segment = (
                self.cache.folder
                / f"segment-{len(list(self.cache.folder.glob('segment-*'))):04d}-{uuid.uuid4().hex[:12]}"
            )
            commit(self.temporary, segment, durable=True)
        except OSError as error:
            self.discard()
            raise DataError(
                f"cannot be written: {error}",
                where=str(self.cache.folder),
                hint="free some space, or set data.cache=off",
            ) from None
        self.cache.add(segment)

    def discard(self) -> None:
        """Remove the segment without a trace."""
        self._lines = {}
        for file in self._files.values():
            file.close()
        shutil.rmtree(self.temporary, ignore_errors=True)


class RowReader:
    """Rows of arrays in several files, read as if they were one array: `gather(positions)`.

    Each row is compared with its check value when this process first reads it.
    """

    def __init__(
        self,
        cache: ArrayCache,
        names: Sequence[str],
        file: NDArray[np.int32],
        row: NDArray[np.int64],
        check: NDArray[np.uint32],
    ) -> None:
        """Take the files' names, and of each row the number of its file, its row there, and the CRC-32
        of its bytes, each (n,).
        """
        self.cache, self.names = cache, list(names)
        self.file, self.row, self.check = file, row, check
        self._maps: list[NDArray[Any]] | None = None
        self._known = np.zeros(-(-len(row) // 8), np.uint8)  # a bit for each row that was compared

    @classmethod
    def of(cls, cache: ArrayCache, keys: NDArray[np.bytes_], name: str) -> RowReader:
        """Return a reader of the arrays of this name that are kept under keys, (n,).

        Raises:
            KeyError: if one is not there.
        """
        names: list[str] = []
        file = np.zeros(len(keys), np.int32)
        row, check = np.zeros(len(keys), np.int64), np.zeros(len(keys), np.uint32)
        for segment, chosen, places in cache.records.groups(keys):
            found = segment.rows[places]
            file[chosen] = found[f"{name} file"].astype(np.int32) + len(names)
            row[chosen], check[chosen] = found[f"{name} row"], found[f"{name} check"]
            names += segment.files
        used, numbers = np.unique(file, return_inverse=True)
        return cls(cache, [names[i] for i in used], numbers.astype(np.int32), row, check)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """How many rows each file must have, (f,)."""
        rows = np.zeros(len(self.names), np.int64)
        np.maximum.at(rows, self.file, self.row + 1)
        return rows

    def is_whole(self, lengths: NDArray[np.int64]) -> bool:
        """Return whether all files are there, with at least these numbers of rows."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            return all(
                len(self.cache.map(name)) >= count
                for name, count in zip(self.names, lengths, strict=True)
            )
        return False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": None}  # worker processes map the files for themselves

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[Any]:
        """Return the arrays (n, ...) at `positions`, which must share one shape.

        Raises:
            DamagedRows: if any differ from what was stored; see `ArrayCache.damaged`.
        """
        if self._maps is None:
            self._maps = [self.cache.map(name) for name in self.names]
        if not len(positions):
            return self._maps[0][:0] if self._maps else np.empty(0, np.uint8)
        file, row = self.file[positions], self.row[positions]
        first = self._maps[file[0]]
        if (file == file[0]).all():
            out: NDArray[Any] = first[row]
        else:
            out = np.empty((len(positions), *first.shape[1:]), first.dtype)
            for number in np.unique(file):
                chosen = file == number
                out[chosen] = self._maps[number][row[chosen]]
        self._verify(positions, out)
        return out

    def _verify(self, positions: NDArray[np.int64], rows: NDArray[Any]) -> None:
        places, bits = positions >> 3, np.uint8(1) << (positions & 7).astype(np.uint8)
        new = np.flatnonzero((self._known[places] & bits) == 0)
        checks = self.check[positions[new]]
        bad = [
            int(number)
            for number, check in zip(new, checks, strict=True)
            if _check(rows[number]) != check
        ]
        if bad:
            raise self.cache.damaged([self.names[self.file[place]] for place in positions[bad]])
        np.bitwise_or.at(self._known, places[new], bits[new])


def _check(array: NDArray[Any]) -> int:
    """Return the CRC-32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data)


def load_array(kind: str, identity: str) -> NDArray[Any] | None:
    """Return the single array that is kept under a hash; None if there is none, or it is damaged."""
    # an .npz has check values, which are compared as it is read
    try:
        with np.load(_array_file(kind, identity), allow_pickle=False) as stored:
            array: NDArray[Any] = stored["array"]
            return array
    except (OSError, ValueError, EOFError, KeyError, IndexError, BadZipFile):
        return None


def save_array(kind: str, identity: str, array: NDArray[Any]) -> None:
    """Keep a single array under a hash; if that fails, only time is lost."""
    with contextlib.suppress(OSError), atomic_file(_array_file(kind, identity)) as file:
        np.savez(file, array=array)


def _array_file(kind: str, identity: str) -> Path:
    return cache_folder() / kind / f"{identity}.npz"
