"""Listings and indexes that were made before, kept in the cache while the file system says that the
files are the same, so that a start looks at files and reads none of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from sfumato.data import files
from sfumato.data.array_cache import ArrayCache, RowReader
from sfumato.data.arrow import arrow, open_table, write_table
from sfumato.data.entry_table import EntryTable, NotStorable, encode
from sfumato.data.listing import Entry, Listing, Reject, Source
from sfumato.data.source_state import SourceState, state_of
from sfumato.storage.atomic import atomic_folder, sweep

if TYPE_CHECKING:
    import pyarrow

SLOW_S = 0.5  # what took less is made again as fast
# files changed so shortly before they were read may change again without another time of change
RECENT_NS = 2 * 10**9
KEPT = 2  # of each source and configuration
TABLE, CHECK, FACTS = "table.arrow", "check", b"sfumato"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A table and plain facts beside it."""

    table: pyarrow.Table
    facts: Mapping[str, Any]

    def column(self, name: str) -> NDArray[Any]:
        """Return a column of numbers, which stays on disk."""
        chunk = self.table.column(name).chunk(0)
        values = chunk.values if chunk.type.num_fields else chunk  # lists of one length
        kind = {"float": "float32"}.get(str(values.type), str(values.type))
        # not `to_numpy`, which imports pandas
        data: NDArray[Any] = np.frombuffer(values.buffers()[1], kind)
        return data[values.offset : values.offset + len(values)]


class Place:
    """Where what belongs to some settings is kept, one folder for each state of the files."""

    def __init__(self, kind: str, settings: str) -> None:
        name = hashlib.sha256(settings.encode()).hexdigest()[:32]
        self._folder = files.cache_folder() / kind / name

    def load(self, state: SourceState) -> Stored | None:
        """Return what is kept of a state; None if there is nothing, or it is damaged."""
        return _load(self._folder / state.hash)

    def newest(self) -> Stored | None:
        """Return what was kept last, of whatever state."""
        return next(filter(None, map(_load, self._newest_first())), None)

    def save(
        self, state: SourceState, columns: Mapping[str, pyarrow.Array], facts: Mapping[str, Any]
    ) -> None:
        """Keep a table; if that fails, only time is lost."""
        pa = arrow()
        table = pa.table(dict(columns)).replace_schema_metadata({FACTS: json.dumps(facts)})
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            sweep(self._folder)
            shutil.rmtree(self._folder / state.hash, ignore_errors=True)
            with atomic_folder(self._folder / state.hash) as folder:
                write_table(table, folder / TABLE)
                (folder / CHECK).write_text(_check(folder / TABLE))
            for old in self._newest_first()[KEPT:]:
                shutil.rmtree(old, ignore_errors=True)

    def _newest_first(self) -> list[Path]:
        with contextlib.suppress(OSError):
            found = [path for path in self._folder.iterdir() if path.name[0] != "."]
            return sorted(found, key=lambda path: -path.stat().st_mtime_ns)
        return []


def _load(folder: Path) -> Stored | None:
    try:
        if (folder / CHECK).read_text() != _check(folder / TABLE):
            return None
        table = open_table(folder / TABLE)
        return Stored(table=table, facts=json.loads(table.schema.metadata[FACTS]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check(file: Path) -> str:
    """Return the CRC-32 of a file."""
    check = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            check = zlib.crc32(block, check)
    return f"{check:08x}"


def is_slow(begun: float) -> bool:
    """Return whether so long has passed since a time of `time.monotonic` that the result is kept."""
    return time.monotonic() - begun > SLOW_S


def is_lasting(source: Source, before: SourceState | None, begun_ns: int) -> bool:
    """Return whether a source is as it was `before` it was read, so that it may be kept under that
    state.
    """
    return (
        before is not None
        and before.newest_ns < begun_ns - RECENT_NS
        and state_of(source) == before
    )


def listed(source: Source) -> Listing:
    """List a source, or return the listing that was made of the same files before.

    Raises:
        DataError: see `Source.listing`.
    """
    state = state_of(source)
    if state is None:
        return source.listing()
    place = Place("listings", repr(source))
    if (stored := place.load(state)) is not None:
        return _listing(stored)
    begun, begun_ns = time.monotonic(), time.time_ns()
    listing = source.listing()
    if is_slow(begun) and is_lasting(source, state, begun_ns):
        with contextlib.suppress(NotStorable):
            place.save(state, encode(listing.entries), _listing_facts(listing))
    return listing


def _listing_facts(listing: Listing) -> dict[str, Any]:
    return {
        "rejects": plain_rejects(listing.rejects),
        "sidecars": listing.sidecars,
        "unit": listing.unit,
        "total": listing.total,
        "remarks": listing.remarks,
    }


def _listing(stored: Stored) -> Listing:
    facts = stored.facts
    return Listing(
        entries=EntryTable(stored.table),
        rejects=rejects_of(facts["rejects"]),
        sidecars=facts["sidecars"],
        unit=facts["unit"],
        total=facts["total"],
        remarks=tuple(facts["remarks"]),
    )


def plain_rejects(rejects: Sequence[Reject]) -> list[tuple[str, str, bool]]:
    """Return rejects as JSON holds them."""
    return [(reject.name, reject.reason, reject.part) for reject in rejects]


def rejects_of(rows: Sequence[tuple[str, str, bool]]) -> list[Reject]:
    """Return rejects from what `plain_rejects` has made of them."""
    return [Reject(*row) for row in rows]


class HexIds(Sequence[str]):
    """Hashes of 16 bytes, (n, 16), as hexadecimal texts."""

    def __init__(self, hashes: NDArray[np.uint8]) -> None:
        self._hashes = hashes

    def __len__(self) -> int:
        return len(self._hashes)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        found = self._hashes[place]
        return [row.tobytes().hex() for row in found] if isinstance(place, slice) else (
            found.tobytes().hex()
        )  # fmt: skip

    def __iter__(self) -> Iterator[str]:
        text = self._hashes.tobytes().hex()
        return (text[begin : begin + 32] for begin in range(0, len(text), 32))


class NamesAt(Sequence[str]):
    """The names of the entries at some positions."""

    def __init__(self, entries: Sequence[Entry], positions: NDArray[np.int64]) -> None:
        self._entries, self._positions = entries, positions

    def __len__(self) -> int:
        return len(self._positions)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as of a list

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self._entries[i].name for i in self._positions[place]]
        return self._entries[int(self._positions[place])].name


def hashes(texts: Sequence[str]) -> pyarrow.Array:
    """Return a column of hashes of 16 bytes, (n, 16), from hexadecimal texts.

    Raises:
        NotStorable: if they are of another length.
    """
    if any(len(text) != 32 for text in texts):
        raise NotStorable("a hash of another length")
    flat = np.frombuffer(bytes.fromhex("".join(texts)), np.uint8)
    return arrow().FixedSizeListArray.from_arrays(flat, 16)


def reader_columns(name: str, reader: RowReader) -> dict[str, pyarrow.Array]:
    """Return the columns of a reader of rows, whose files are facts."""
    pa = arrow()
    return {
        f"{name}_file": pa.array(reader.file),
        f"{name}_row": pa.array(reader.row),
        f"{name}_check": pa.array(reader.check),
    }


def reader(name: str, stored: Stored) -> RowReader | None:
    """Return a reader of rows; None if one of its files is gone."""
    folder, names = stored.facts[f"{name}_folder"], stored.facts[f"{name}_files"]
    columns = [stored.column(f"{name}_{column}") for column in ("file", "row", "check")]
    result = RowReader(ArrayCache(Path(folder)), names, *columns)
    return result if result.is_whole else None


class KnownKeys:
    """The keys of images that were read before, by the numbers of `Identities`."""

    def __init__(self, stored: Stored | None) -> None:
        self._numbers: NDArray[np.int64] = np.empty(0, np.int64)
        self._keys: NDArray[np.uint8] = np.empty((0, 16), np.uint8)
        if stored is not None:
            numbers = stored.column("identity")
            order = np.argsort(numbers, kind="stable")
            self._numbers = numbers[order]
            self._keys = stored.column("key").reshape(-1, 16)[order]

    def of(self, number: int | None) -> str | None:
        """Return the key of the image with this number; None if it is not known."""
        if not number or not len(self._numbers):
            return None
        place = int(np.searchsorted(self._numbers, number))
        if place == len(self._numbers) or self._numbers[place] != number:
            return None
        key: bytes = self._keys[place].tobytes()
        return key.hex()
