"""A cache on disk of arrays made from samples, kept under the hash of what they were made from and
memory-mapped.

A key is the hash of a sample's bytes; a folder stands for the transform (and encoder) that made the
arrays. So an edited image is the only one that misses, a changed setting makes every image miss,
and nothing stale is ever found. Files are only ever added, one segment at a time, by one rename:
several processes may fill the same folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sfumato.data import files
from sfumato.errors import DataError
from sfumato.storage.atomic import commit

FORMAT = "2"


@dataclass(frozen=True, slots=True)
class Record:
    """What is kept under one key: plain facts, and for each named array the file and row that hold
    it.
    """

    facts: Mapping[str, Any]
    arrays: Mapping[str, tuple[str, int]]


@dataclass
class ArrayCache:
    """The records of one transform.

    Attributes:
        folder: its own.
        records: what is there, by key.
    """

    folder: Path
    records: dict[str, Record] = field(default_factory=dict)

    @classmethod
    def open(cls, kind: str, transform: str) -> ArrayCache:
        """Open the cache of `kind` ("pixels", "latents", ...) for a transform described as text."""
        name = hashlib.sha256(f"{FORMAT} {transform}".encode()).hexdigest()[:24]
        cache = cls(files.cache_folder() / kind / name)
        for segment in sorted(cache.folder.glob("segment-*")):
            cache._read(segment)
        return cache

    def _read(self, segment: Path) -> None:
        try:
            with (segment / "records.jsonl").open() as lines:
                records = {}
                rows: dict[str, int] = {}
                for line in lines:
                    key, facts, arrays = json.loads(line)
                    records[key] = Record(
                        dict(facts),
                        {
                            name: (f"{segment.name}/{file}", row)
                            for name, (file, row) in arrays.items()
                        },
                    )
                    for file, row in arrays.values():
                        if row < 0:
                            return
                        rows[file] = max(row, rows.get(file, 0))
                if any(
                    len(self.map(f"{segment.name}/{file}")) <= row for file, row in rows.items()
                ):
                    return
        except (OSError, ValueError, TypeError, AttributeError, IndexError, RecursionError):
            return  # damaged: its keys are missed, and made again
        self.records.update(records)

    def map(self, file: str) -> NDArray[Any]:
        """Memory-map one file of arrays, (rows, ...); its shape and dtype are in its name."""
        dtype, *shape = file.rpartition("/")[2].removesuffix(".bin").split("-")[1].split("x")
        sizes = tuple(int(size) for size in shape)
        path = self.folder / file
        row = int(np.prod(sizes)) * np.dtype(dtype).itemsize
        return np.memmap(path, dtype=dtype, mode="r", shape=(path.stat().st_size // row, *sizes))

    def size_bytes(self) -> int:
        """Return the size of the cache's folder on disk."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


class Writer:
    """Adds one segment to a cache; none of it is visible before `commit`."""

    def __init__(self, cache: ArrayCache) -> None:
        self.cache = cache
        self.temporary = cache.folder / f".tmp-{uuid.uuid4().hex}"
        self._files: dict[str, BinaryIO] = {}
        self._rows: dict[str, int] = {}
        self._lines: list[str] = []
        self.temporary.mkdir(parents=True)

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, key: str, facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Store `facts` and `arrays` under `key`."""
        places = {}
        for name, array in arrays.items():
            file = f"{name}-{'x'.join([array.dtype.str[1:], *map(str, array.shape)])}.bin"
            if file not in self._files:
                self._files[file], self._rows[file] = (self.temporary / file).open("wb"), 0
            self._files[file].write(np.ascontiguousarray(array).data)
            places[name] = (file, self._rows[file])
            self._rows[file] += 1
        self._lines.append(json.dumps([key, facts, places]))

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
                file.close()
            (self.temporary / "records.jsonl").write_text("\n".join(self._lines) + "\n")
            segment = (
                self.cache.folder
                / f"segment-{len(list(self.cache.folder.glob('segment-*'))):04d}-{uuid.uuid4().hex[:12]}"
            )
            commit(self.temporary, segment)
        except OSError as error:
            self.discard()
            raise DataError(
                f"cannot be written: {error}",
                where=str(self.cache.folder),
                hint="free some space, or set data.cache=off",
            ) from None
        self.cache._read(segment)

    def discard(self) -> None:
        """Remove the segment without a trace."""
        for file in self._files.values():
            file.close()
        shutil.rmtree(self.temporary, ignore_errors=True)


class RowReader:
    """Rows of arrays in several files, read as if they were one array: `gather(positions)`."""

    def __init__(self, cache: ArrayCache, places: list[tuple[str, int]]) -> None:
        names = sorted({file for file, _ in places})
        numbers = {name: number for number, name in enumerate(names)}
        self.cache, self.names = cache, names
        self.file = np.array([numbers[file] for file, _ in places], np.int32)
        self.row = np.array([row for _, row in places], np.int64)
        self._maps: list[NDArray[Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": None}  # worker processes map the files for themselves

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[Any]:
        """Return the arrays (n, ...) at `positions`, which must share one shape."""
        if self._maps is None:
            self._maps = [self.cache.map(name) for name in self.names]
        if not len(positions):
            return self._maps[0][:0] if self._maps else np.empty(0, np.uint8)
        file, row = self.file[positions], self.row[positions]
        first = self._maps[file[0]]
        if (file == file[0]).all():
            result: NDArray[Any] = first[row]
            return result
        out = np.empty((len(positions), *first.shape[1:]), first.dtype)
        for number in np.unique(file):
            chosen = file == number
            out[chosen] = self._maps[number][row[chosen]]
        return out
