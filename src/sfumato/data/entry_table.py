"""Entries as memory-mapped columns, which all processes of a machine share; each access creates an
`Entry`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from sfumato.data.arrow import arrow
from sfumato.data.listing import Blob, Entry, File, Inline, Slice, ZipMember, containers

if TYPE_CHECKING:
    import pyarrow

FIELDS = ("name", "category", "captions", "attributes", "holdout", "group", "repeats")
BLOBS = ("image", "doodle", "mask", "points")
AT_ONCE = 10_000  # entries that are made at once by an iteration


class NotStorable(Exception):
    """An entry that columns cannot hold, such as one with a blob of another package."""


@lru_cache
def _blob_kinds() -> dict[str, type]:
    """Return all kinds of blobs, by name: nothing else is ever made from a file."""
    from sfumato.data.frames import Brightest, Frame
    from sfumato.data.sources.huggingface import Item
    from sfumato.data.sources.npz import ArrayImage
    from sfumato.data.sources.parquet import Cell

    kinds = (ArrayImage, Brightest, Cell, File, Frame, Inline, Item, Slice, ZipMember)
    return {kind.__name__: kind for kind in kinds}


class EntryTable(Sequence[Entry]):
    """Entries in an Arrow table."""

    def __init__(self, table: pyarrow.Table) -> None:
        """Take the columns of `encode`; others are left alone."""
        self._columns = {
            name: column.chunk(0) if column.num_chunks else column.combine_chunks()
            for name, column in zip(table.column_names, table.columns, strict=True)
            if name in FIELDS or name.partition("_")[0] in BLOBS
        }
        self._length = int(table.num_rows)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, place: int) -> Entry: ...
    @overload
    def __getitem__(self, place: slice) -> list[Entry]: ...
    def __getitem__(self, place: int | slice) -> Entry | list[Entry]:
        if isinstance(place, slice):
            numbers = range(*place.indices(len(self)))
            if numbers.step == 1:
                return list(self._between(numbers.start, numbers.stop))
            return [self[number] for number in numbers]
        number = int(place)
        if not -len(self) <= number < len(self):
            raise IndexError(f"{number} of {len(self)} entries")
        number %= len(self)
        return _entry({name: column[number].as_py() for name, column in self._columns.items()})

    def __iter__(self) -> Iterator[Entry]:
        return self._between(0, len(self))

    def _between(self, first: int, end: int) -> Iterator[Entry]:
        for begin in range(first, end, AT_ONCE):
            parts = {
                name: column[begin : min(end, begin + AT_ONCE)].to_pylist()
                for name, column in self._columns.items()
            }
            for row in zip(*parts.values(), strict=True):
                yield _entry(dict(zip(parts, row, strict=True)))

    def take(self, positions: NDArray[np.int64]) -> EntryTable:
        """Return the entries at some positions."""
        pa = arrow()
        return EntryTable(pa.table(self._columns).take(pa.array(positions)))

    def containers(self) -> NDArray[np.int64]:
        """Return a number for the file that holds each image; see `listing.containers`."""
        kinds = self._columns["image_kind"].unique().to_pylist()
        if any("file" in _layout(_blob_kinds()[kind])[1] for kind in kinds):  # which has the path
            return containers(list(self))
        paths = self._columns["image_path"]
        coded = paths if hasattr(paths, "indices") else paths.dictionary_encode()
        numbers: NDArray[np.int64] = np.array(coded.indices.fill_null(-1), np.int64)
        return numbers

    @property
    def columns(self) -> dict[str, pyarrow.Array]:
        """The columns, as `encode` makes them."""
        return dict(self._columns)

    def value(self, name: str, place: int) -> Any:
        """Return one field of one entry; see `listing.value_at`."""
        if name != "captions":
            return getattr(self[place], name)
        return tuple(self._columns[name][int(place)].as_py())

    def integers(self, name: str) -> NDArray[np.integer]:
        """Return one field of all entries; see `listing.integers`."""
        found: NDArray[np.integer] = self._columns[name].to_numpy()
        return found

    def values(self, name: str) -> list[Any]:
        """Return one field of all entries; see `listing.values`."""
        if name in BLOBS:
            return [getattr(entry, name) for entry in self]
        found = self._columns[name].to_pylist()
        if name == "captions":
            return [tuple(texts) for texts in found]
        return [_attributes(text) for text in found] if name == "attributes" else found


def _attributes(text: str | None) -> tuple[tuple[str, float], ...]:
    return () if text is None else tuple((name, value) for name, value in json.loads(text))


def _entry(row: dict[str, Any]) -> Entry:
    """Make an entry of one row."""
    blobs = {
        name: _decoded(row[f"{name}_kind"], row[f"{name}_path"], row[f"{name}_a"],
                       row[f"{name}_b"], row[f"{name}_more"])
        for name in BLOBS
        if row.get(f"{name}_kind") is not None
    }  # fmt: skip
    return Entry(
        name=row["name"],
        category=row["category"],
        captions=tuple(row["captions"]),
        attributes=_attributes(row["attributes"]),
        holdout=row["holdout"],
        group=row["group"],
        repeats=row["repeats"],
        **blobs,
    )


def encode(entries: Sequence[Entry]) -> dict[str, pyarrow.Array]:
    """Return the columns of entries.

    Raises:
        NotStorable: if a blob is of a kind that is not known here.
    """
    if isinstance(entries, EntryTable):
        return entries.columns
    return joined([encode_part(entries)]).columns


def encode_part(entries: Sequence[Entry]) -> pyarrow.Table:
    """Return entries as a part of the columns of `encode`; see `joined`.

    Raises:
        NotStorable: as `encode`.
    """
    pa = arrow()
    columns = {
        "name": pa.array([entry.name for entry in entries], pa.large_string()),
        "category": _coded([entry.category for entry in entries]),
        "captions": pa.array(
            [entry.captions for entry in entries], pa.large_list(pa.large_string())
        ),
        "attributes": pa.array(
            [json.dumps(entry.attributes) if entry.attributes else None for entry in entries],
            pa.large_string(),
        ),
        "holdout": _coded([entry.holdout for entry in entries]),
        "group": pa.array([entry.group for entry in entries], pa.large_string()),
        "repeats": pa.array([entry.repeats for entry in entries], pa.int32()),
    }
    for name in BLOBS:
        blobs = [getattr(entry, name) for entry in entries]
        if any(blob is not None for blob in blobs):
            columns |= _encoded(name, blobs)
    return pa.table(columns)


def joined(parts: Sequence[pyarrow.Table]) -> EntryTable:
    """Return the entries of parts, one after another.

    Of columns of texts that most entries share, each text is kept once.
    """
    pa = arrow()
    table = pa.concat_tables(parts, promote_options="default").unify_dictionaries()
    columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        whole = column.combine_chunks()  # of one chunk, some versions return it and others a list
        whole = whole if isinstance(whole, pa.Array) else whole.chunk(0)
        coded = getattr(whole, "dictionary", None)
        is_rare = coded is not None and 2 * len(coded) >= len(whole)
        columns[name] = whole.dictionary_decode() if is_rare else whole
    return EntryTable(pa.table(columns))


def _coded(texts: Sequence[str | None]) -> pyarrow.Array:
    pa = arrow()
    return pa.array(texts, pa.large_string()).dictionary_encode()


def _encoded(name: str, blobs: Sequence[Blob | None]) -> dict[str, pyarrow.Array]:
    pa = arrow()
    rows = [(None, None, None, None, None) if blob is None else _parts(blob) for blob in blobs]
    kinds, paths, firsts, seconds, more = zip(*rows, strict=True)
    return {
        f"{name}_kind": _coded(kinds),
        f"{name}_path": _coded(paths),
        f"{name}_a": pa.array(firsts, pa.int64()),
        f"{name}_b": pa.array(seconds, pa.int64()),
        f"{name}_more": _coded(more),
    }


@lru_cache
def _layout(kind: type) -> tuple[list[str], list[str]]:
    """Return which fields of a kind of blob are in columns of integers, and which are in JSON."""
    names = [field.name for field in fields(kind)]
    types = {field.name: str(field.type) for field in fields(kind)}
    numbers = [name for name in names if types[name] == "int"][:2]
    return numbers, [name for name in names if name not in ("path", *numbers)]


def _parts(blob: Blob) -> tuple[str, str | None, int | None, int | None, str | None]:
    """Return the kind of a blob, its path, its first two integers, and the rest as JSON."""
    kind = type(blob)
    if _blob_kinds().get(kind.__name__) is not kind:
        raise NotStorable(kind.__name__)
    numbers, rest = _layout(kind)
    first, second = (*(getattr(blob, name) for name in numbers), None, None)[:2]
    more = {name: _plain(getattr(blob, name)) for name in rest}
    return (
        kind.__name__,
        getattr(blob, "path", None),
        first,
        second,
        json.dumps(more) if more else None,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, str | int | tuple):
        return value
    return {"blob": _parts(value)}


def _decoded(
    kind: str, path: str | None, first: int | None, second: int | None, more: str | None
) -> Blob:
    numbers, _ = _layout(_blob_kinds()[kind])
    values: dict[str, Any] = {} if path is None else {"path": path}
    values |= dict(zip(numbers, (first, second), strict=False))
    values |= {name: _value(value) for name, value in json.loads(more or "{}").items()}
    blob: Blob = _blob_kinds()[kind](**values)
    return blob


def _value(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, dict):
        return value
    return base64.b64decode(value["base64"]) if "base64" in value else _decoded(*value["blob"])
