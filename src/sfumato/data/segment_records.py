"""Records of the arrays in a cache, in columns that are memory-mapped: which arrays each key has, where
they are, and plain facts.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

HEAD, ROWS, FACTS = "segment.json", "records.npy", "facts.jsonl"
LINES = "records.jsonl"  # of versions before, which had all in one file
KEY = "S16"
ROW_BITS = 40  # of the place of a record, above which is the number of its segment
HASH = re.compile("[0-9a-f]{32}")
# what is raised on a segment that is damaged
DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
    RecursionError,
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where an array is: its file, its row there, and the CRC-32 of its bytes."""

    file: str
    row: int
    check: int


@dataclass(frozen=True, slots=True)
class Record:
    """What is kept under one key: plain facts, and the place of each named array."""

    facts: Mapping[str, Any]
    arrays: Mapping[str, Place]


def key_of(data: bytes) -> str:
    """Return the key of an encoded image: the first 16 bytes of its SHA-256, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()[:32]


def stored_key(key: str) -> bytes:
    """Return the 16 bytes that stand for a key: itself if it is a hash of that length."""
    if HASH.fullmatch(key):
        return bytes.fromhex(key)
    return hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=16).digest()


def stored_keys(keys: Sequence[str]) -> NDArray[np.bytes_]:
    """Return what stands for keys, (n,)."""
    return np.array([stored_key(key) for key in keys], KEY)


def bytes_of(keys: NDArray[np.bytes_]) -> NDArray[np.uint8]:
    """Return the bytes of keys, (n, 16)."""
    return np.ascontiguousarray(keys).view(np.uint8).reshape(-1, 16)


def row_type(names: Sequence[str]) -> np.dtype[Any]:
    """Return the columns of records: the key, where its facts are, and of each array the number of its
    file, -1 for none, its row there, and its check value.
    """
    columns: list[tuple[str, str]] = [("key", KEY), ("begin", "<i8"), ("length", "<i4")]
    for name in names:
        columns += [(f"{name} file", "<i2"), (f"{name} row", "<i8"), (f"{name} check", "<u4")]
    return np.dtype(columns)


class Segment:
    """The records of one segment of a cache.

    Attributes:
        files: those of its arrays, by number, below the folder of the cache.
        names: of the arrays.
        rows: (n,), of `row_type`.
    """

    def __init__(
        self,
        folder: Path,
        head: Mapping[str, Any],
        rows: NDArray[Any],
        facts: NDArray[np.uint8] | Path,
    ) -> None:
        self.names: list[str] = list(head["names"])
        self.files = [f"{folder.name}/{file}" for file in head["files"]]
        self.rows, self._facts = rows, facts
        if rows.dtype != row_type(self.names):
            raise ValueError("records of another kind")

    @classmethod
    def open(cls, folder: Path) -> Segment:
        """Map the records in a folder.

        Raises:
            OSError, ValueError, ...: see `DAMAGED`.
        """
        if (folder / LINES).exists():
            lines = map(json.loads, (folder / LINES).read_text().splitlines())
            return cls(folder, *_packed((key, facts, arrays) for key, facts, arrays in lines))
        head = json.loads((folder / HEAD).read_text())
        # not mapped: each map is an open file, of which a process may have a thousand
        rows = np.load(folder / ROWS, allow_pickle=False)
        facts = np.memmap(folder / FACTS, np.uint8, "r")
        if [_check(rows.view(np.uint8)), _check(facts)] != head["checks"]:
            raise ValueError("records differ from what was written")
        return cls(folder, head, rows, folder / FACTS)

    def facts(self, places: NDArray[np.int64]) -> Iterator[dict[str, Any]]:
        """Yield the facts of some records."""
        begins, lengths = self.rows["begin"][places].tolist(), self.rows["length"][places].tolist()
        facts = (
            np.memmap(self._facts, np.uint8, "r") if isinstance(self._facts, Path) else self._facts
        )
        for begin, length in zip(begins, lengths, strict=True):
            yield dict(json.loads(facts[begin : begin + length].tobytes()))

    def place(self, number: int, name: str) -> Place | None:
        """Return where one array of one record is."""
        row = self.rows[number]
        file = int(row[f"{name} file"])
        if file < 0:
            return None
        return Place(self.files[file], int(row[f"{name} row"]), int(row[f"{name} check"]))

    def longest(self) -> dict[str, int]:
        """Return how many rows each file has at least."""
        result = dict.fromkeys(self.files, 0)
        for name in self.names:
            numbers, rows = self.rows[f"{name} file"], self.rows[f"{name} row"]
            if (numbers >= 0).any() and rows[numbers >= 0].min() < 0:
                raise ValueError("a row below 0")
            for number in np.unique(numbers[numbers >= 0]).tolist():
                file = self.files[number]
                result[file] = max(result[file], int(rows[numbers == number].max()) + 1)
        return result


Line = tuple[str, Mapping[str, Any], Mapping[str, tuple[str, int, int]]]


def _packed(lines: Iterator[Line]) -> tuple[dict[str, Any], NDArray[Any], NDArray[np.uint8]]:
    """Return the head, the rows and the facts of records: key, facts, and the file, row and check value
    of each array.
    """
    kept = list(lines)
    names = sorted({name for _, _, arrays in kept for name in arrays})
    files = sorted({place[0] for _, _, arrays in kept for place in arrays.values()})
    numbers = {file: number for number, file in enumerate(files)}
    texts = [json.dumps(dict(facts)).encode() for _, facts, _ in kept]
    lengths = np.array([len(text) + 1 for text in texts], np.int64)
    rows = np.zeros(len(kept), row_type(names))
    rows["key"] = stored_keys([key for key, _, _ in kept])
    rows["begin"], rows["length"] = np.cumsum(lengths) - lengths, lengths
    for name in names:
        places = [arrays.get(name) for _, _, arrays in kept]
        for column, number in (("row", 1), ("check", 2)):
            rows[f"{name} {column}"] = [0 if place is None else place[number] for place in places]
        rows[f"{name} file"] = [-1 if place is None else numbers[place[0]] for place in places]
    facts = np.frombuffer(b"\n".join([*texts, b""]), np.uint8)
    return {"names": names, "files": files}, rows, facts


def write_records(folder: Path, lines: Sequence[Line]) -> None:
    """Write records beside their arrays."""
    head, rows, facts = _packed(iter(lines))
    with (folder / ROWS).open("wb") as file:
        np.save(file, rows, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    (folder / FACTS).write_bytes(facts.tobytes())
    checks = [_check(rows.view(np.uint8)), _check(facts)]
    (folder / HEAD).write_text(json.dumps({**head, "checks": checks}))


def _check(data: NDArray[np.uint8]) -> int:
    return zlib.crc32(np.ascontiguousarray(data).data)


class _Sorted(NamedTuple):
    """Keys in order, and where each is: segment and row in one number, (n,)."""

    keys: NDArray[np.bytes_]
    places: NDArray[np.int64]

    @classmethod
    def of(cls, numbers: Iterable[int], segments: Sequence[Segment]) -> _Sorted:
        """Sort the keys of segments, which have these numbers."""
        places = [
            (number << ROW_BITS) + np.arange(len(segment.rows), dtype=np.int64)
            for number, segment in zip(numbers, segments, strict=True)
        ]
        return _in_order([segment.rows["key"] for segment in segments], places)

    def merged(self, newer: _Sorted) -> _Sorted:
        """Return these keys and newer ones; of equal ones, the newer comes last."""
        return _in_order([self.keys, newer.keys], [self.places, newer.places])

    def find(self, keys: NDArray[np.bytes_]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Return which of some keys are here, and where these are; of equal ones, the last."""
        if not len(self.keys):
            return np.zeros(len(keys), np.bool_), np.empty(0, np.int64)
        places = np.maximum(np.searchsorted(self.keys, keys, side="right") - 1, 0)
        there: NDArray[np.bool_] = self.keys[places] == keys
        return there, self.places[places[there]]


def _in_order(keys: Sequence[NDArray[Any]], places: Sequence[NDArray[np.int64]]) -> _Sorted:
    joined = np.concatenate(keys)
    order = np.argsort(joined, kind="stable")
    return _Sorted(joined[order], np.concatenate(places)[order])


class Records(Mapping[str, Record]):
    """The records of all segments of a cache; of those with equal keys, the one in the last segment."""

    def __init__(self, segments: Sequence[Segment] = ()) -> None:
        self._segments = list(segments)
        self._runs: list[_Sorted] = []  # in the order of the segments
        self._indexed = 0  # segments
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[type[Records], tuple[list[Segment]]]:
        return Records, (self._segments,)

    def add(self, segment: Segment) -> None:
        """Add those of a segment."""
        with self._lock:
            self._segments.append(segment)

    def _index(self) -> list[_Sorted]:
        """Return all keys as a few sorted columns, of which each is at least twice as long as the next, so
        that adding segments one by one sorts a key a few times and not each time.
        """
        with self._lock:
            new = self._segments[self._indexed :]
            if new:
                numbers = range(self._indexed, len(self._segments))
                self._runs = [*self._runs, _Sorted.of(numbers, new)]
                self._indexed = len(self._segments)
            while len(self._runs) > 1 and len(self._runs[-2].keys) < 2 * len(self._runs[-1].keys):
                *others, older, newer = self._runs
                self._runs = [*others, older.merged(newer)]
            return self._runs

    def _distinct(self) -> NDArray[np.bytes_]:
        """Return all keys, each once, in order."""
        with self._lock:
            runs = self._index()
            if not runs:
                return np.empty(0, KEY)
            while len(runs) > 1:
                *others, older, newer = runs
                runs = [*others, older.merged(newer)]
            self._runs = runs
        keys = runs[0].keys
        result: NDArray[np.bytes_] = keys[np.append(True, keys[1:] != keys[:-1])[: len(keys)]]
        return result

    def find(self, keys: NDArray[np.bytes_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the numbers of the segments that hold keys, (n,), -1 for none, and their rows there."""
        found = np.full(len(keys), -1)
        for run in self._index():
            there, places = run.find(keys)
            found[there] = places
        return np.where(found < 0, -1, found >> ROW_BITS), np.where(
            found < 0, 0, found & (1 << ROW_BITS) - 1
        )

    def groups(
        self, keys: NDArray[np.bytes_]
    ) -> Iterator[tuple[Segment, NDArray[np.int64], NDArray[np.int64]]]:
        """Yield segments, with which of the keys they hold, and the rows of these.

        Raises:
            KeyError: if one is not there.
        """
        numbers, rows = self.find(keys)
        if len(keys) and numbers.min() < 0:
            raise KeyError(keys[numbers.argmin()])
        for number in np.unique(numbers).tolist():
            chosen = np.flatnonzero(numbers == number)
            yield self._segments[number], chosen, rows[chosen]

    def facts(self, keys: NDArray[np.bytes_]) -> list[dict[str, Any]]:
        """Return the facts that are kept under keys.

        Raises:
            KeyError: if one is not there.
        """
        result: list[dict[str, Any]] = [{}] * len(keys)
        for segment, chosen, rows in self.groups(keys):
            for place, facts in zip(chosen.tolist(), segment.facts(rows), strict=True):
                result[place] = facts
        return result

    def __getitem__(self, key: str) -> Record:
        for segment, _, rows in self.groups(stored_keys([key])):
            places = {name: segment.place(int(rows[0]), name) for name in segment.names}
            return Record(
                next(segment.facts(rows)),
                {name: place for name, place in places.items() if place is not None},
            )
        raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return bool(self.find(stored_keys([str(key)]))[0][0] >= 0)

    def __len__(self) -> int:
        return len(self._distinct())

    def __iter__(self) -> Iterator[str]:
        for row in bytes_of(self._distinct()):
            yield row.tobytes().hex()
