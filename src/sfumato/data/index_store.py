"""Listings and indexes that were made before, kept in the cache while the file system says that the
files are the same, so that a start looks at files and reads none of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.data import files, source_state
from sfumato.data.array_cache import ArrayCache, RowReader
from sfumato.data.arrow import arrow, open_table, write_table
from sfumato.data.choice import choose_evenly
from sfumato.data.entry_table import EntryTable, NotStorable, encode
from sfumato.data.listing import Entry, Listing, Reject, Source, SourceState, value_at
from sfumato.data.source_state import absolute, state_of
from sfumato.storage.atomic import atomic_folder, sweep
from sfumato.storage.cache_folder import cache_folder

if TYPE_CHECKING:
    import pyarrow

    Columns = Mapping[str, pyarrow.Array]
    Facts = Mapping[str, Any]

SLOW_S = 0.5  # what took less is made again as fast
KEPT = 2  # of each source and configuration
FORMAT = 2  # raised when columns change
BLOCK, CHECKED = 1 << 20, 256  # bytes, and blocks of a table that are compared with its check value
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
        text = f"{FORMAT} {settings}".encode(errors="surrogatepass")
        name = hashlib.sha256(text).hexdigest()[:32]
        self._folder = cache_folder() / kind / name

    def load(self, state: SourceState) -> Stored | None:
        """Return what is kept of a state; None if there is nothing, or it is damaged."""
        return _load(self._folder / state.hash)

    def save(self, state: SourceState, make: Callable[[], tuple[Columns, Facts]]) -> None:
        """Keep the columns and facts that `make` returns; if that fails, only time is lost."""
        pa = arrow()
        try:
            columns, facts = make()
            table = pa.table(dict(columns)).replace_schema_metadata({FACTS: json.dumps(facts)})
            self._write(state, table)
        except (NotStorable, OSError, ValueError, TypeError, OverflowError, pa.ArrowException):
            return

    def _write(self, state: SourceState, table: pyarrow.Table) -> None:
        write_folder(self._folder / state.hash, table)
        for old in self._newest_first()[KEPT:]:
            shutil.rmtree(old, ignore_errors=True)

    def _newest_first(self) -> list[Path]:
        with contextlib.suppress(OSError):
            found = [path for path in self._folder.iterdir() if path.name[0] != "."]
            return sorted(found, key=lambda path: -path.stat().st_mtime_ns)
        return []


def write_folder(folder: Path, table: pyarrow.Table) -> None:
    """Write a table and its check value as a folder, which is there as a whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent)
    shutil.rmtree(folder, ignore_errors=True)
    with atomic_folder(folder) as temporary:
        write_table(table, temporary / TABLE)
        (temporary / CHECK).write_text(_check(temporary / TABLE))


def _load(folder: Path) -> Stored | None:
    try:
        if (folder / CHECK).read_text() != _check(folder / TABLE):
            return None
        table = open_table(folder / TABLE)
        return Stored(table=table, facts=json.loads(table.schema.metadata[FACTS]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check(file: Path) -> str:
    """Return the CRC-32 of a file's length and of at most CHECKED blocks, spread evenly over it."""
    size = file.stat().st_size
    blocks = -(-size // BLOCK)
    check = zlib.crc32(str(size).encode()) if blocks > CHECKED else 0
    with file.open("rb") as stream:
        for number in choose_evenly(np.arange(blocks), CHECKED).tolist():
            stream.seek(number * BLOCK)
            check = zlib.crc32(stream.read(BLOCK), check)
    return f"{check:08x}"


class Watch:
    """A time from which on a source must stay as it is, for what is read of it to be kept."""

    def __init__(self) -> None:
        self._begun, self._begun_ns = time.monotonic(), time.time_ns()
        self._failed = files.failed_reads()

    @property
    def was_slow(self) -> bool:
        """Whether so much time has passed that the result is worth keeping."""
        return time.monotonic() - self._begun > SLOW_S

    def is_lasting(self, source: Source, state: SourceState) -> bool:
        """Return whether a source is in this state since, and all reading of it has worked."""
        return (
            files.failed_reads() == self._failed
            and state.newest_ns < self._begun_ns - source_state.RECENT_NS
            and state_of(source, notes=False) == state
        )


def listed(source: Source, *, trusts: bool = True) -> Listing:
    """List a source, or return the listing that was made of the same files before.

    Args:
        trusts: whether the file system is believed; if not, nothing is looked for or kept.
    Raises:
        DataError: see `Source.listing`.
    """
    state = state_of(source)  # which notes, in any case, which versions of remote files are read
    if state is None or not trusts:
        return source.listing()
    place = Place("listings", repr(source))
    if (stored := place.load(state)) is not None and _has_containers(stored):
        return _listing(stored, state)
    watch = Watch()
    listing = source.listing()
    if not watch.is_lasting(source, state):
        return listing
    if watch.was_slow:
        place.save(state, lambda: (encode(listing.entries), _listing_facts(listing)))
        if (stored := place.load(state)) is not None:  # in columns, which take little memory
            return _listing(stored, state)
    return replace(listing, state=state)


def _has_containers(stored: Stored) -> bool:
    """Return whether the files are there that hold the images of several entries: some lie in the
    cache. Those behind an address are fetched again.
    """
    paths = stored.table.column("image_path").chunk(0)
    containers = getattr(paths, "dictionary", None)
    paths = [] if containers is None else containers.to_pylist()
    return all(files.is_url(path) or Path(path).exists() for path in paths)


def _listing_facts(listing: Listing) -> dict[str, Any]:
    return {
        "rejects": plain_rejects(listing.rejects),
        "sidecars": listing.sidecars,
        "unit": listing.unit,
        "total": listing.total,
        "remarks": listing.remarks,
    }


def _listing(stored: Stored, state: SourceState) -> Listing:
    facts = stored.facts
    return Listing(
        entries=EntryTable(stored.table),
        rejects=rejects_of(facts["rejects"]),
        sidecars=facts["sidecars"],
        unit=facts["unit"],
        total=facts["total"],
        remarks=tuple(facts["remarks"]),
        state=state,
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

    @classmethod
    def of(cls, texts: Sequence[str]) -> HexIds:
        """Return hashes from hexadecimal texts."""
        return cls(np.frombuffer(bytes.fromhex("".join(texts)), np.uint8).reshape(-1, 16))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as of a list

    @property
    def bytes(self) -> NDArray[np.uint8]:
        """The hashes, (n, 16)."""
        return self._hashes

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

    @property
    def positions(self) -> NDArray[np.int64]:
        """Where they are."""
        return self._positions

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
            return [value_at(self._entries, "name", i) for i in self._positions[place]]
        name: str = value_at(self._entries, "name", int(self._positions[place]))
        return name


def hashes(array: NDArray[Any]) -> pyarrow.Array:
    """Return a column of hashes of 16 bytes, (n, 16)."""
    flat = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
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
    lengths = stored.facts.get(f"{name}_lengths")  # which versions before did not keep
    is_whole = result.is_whole(result.lengths if lengths is None else np.array(lengths, np.int64))
    return result if is_whole else None


def read_only_tensor(array: NDArray[Any]) -> Tensor:
    """Return a tensor of an array that stays on disk; nothing may be written to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


class KeyStore:
    """Which bytes the images of a source have, as all have found who have read some of them."""

    def __init__(self, source: Source) -> None:
        path = absolute(getattr(source, "path", ""))
        name = hashlib.sha256(f"{FORMAT} {path}".encode(errors="surrogatepass")).hexdigest()[:32]
        self._folder = cache_folder() / "keys" / name

    def save(
        self, keys: NDArray[np.bytes_], identities: NDArray[np.int64], *, replaces: bool = False
    ) -> None:
        """Keep the keys of some images; if that fails, only time is lost.

        Args:
            replaces: whether these are all images, so that what was kept before is not needed.
        """
        older = list(self._folder.glob("*")) if replaces else []
        if len(keys):
            pa = arrow()
            with contextlib.suppress(OSError):
                columns = {"key": hashes(keys), "identity": pa.array(identities)}
                table = pa.table(columns).replace_schema_metadata({FACTS: "{}"})
                write_folder(self._folder / uuid.uuid4().hex, table)
                for folder in older:
                    shutil.rmtree(folder, ignore_errors=True)

    def load(self) -> list[Stored]:
        """Return all that is kept."""
        with contextlib.suppress(OSError):
            return [*filter(None, map(_load, sorted(self._folder.iterdir())))]
        return []


class KnownKeys:
    """The keys of images that were read before, by the numbers of `Identities`."""

    def __init__(self, stored: Sequence[Stored] = ()) -> None:
        numbers = [each.column("identity") for each in stored]
        keys = [each.column("key").reshape(-1, 16) for each in stored]
        self._numbers = np.concatenate([np.empty(0, np.int64), *numbers])
        order = np.argsort(self._numbers, kind="stable")
        self._numbers = self._numbers[order]
        self._keys = np.concatenate([np.empty((0, 16), np.uint8), *keys])[order]

    def of(self, number: int | None) -> str | None:
        """Return the key of the image with this number; None if it is not known."""
        if not number or not len(self._numbers):
            return None
        place = int(np.searchsorted(self._numbers, number))
        if place == len(self._numbers) or self._numbers[place] != number:
            return None
        key: bytes = self._keys[place].tobytes()
        return key.hex()
