"""Parquet with images inside, as Hugging Face writes it."""

from __future__ import annotations

import io
import json
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from sfumato.data import files
from sfumato.data.arrow import arrow
from sfumato.data.entry_table import encode_part, joined
from sfumato.data.file_types import ANNOTATION_FILES
from sfumato.data.listing import (
    REPEATS_KEY,
    Entry,
    Listing,
    Reject,
    Source,
    is_known_column,
    normalized_key,
    parse_annotations,
    printable_name,
)
from sfumato.data.listing_parts import in_parts
from sfumato.data.sources.metadata import FILE_KEYS
from sfumato.data.split_names import held_out_files
from sfumato.errors import DataError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "picture", "image_bytes")
CACHE_BYTES = 512 << 20  # of row groups kept in memory by each process
MAX_GROUP_BYTES, MAX_ROWS = 2 << 30, 5_000_000  # of one file
BATCH, MAX_RATIO = 100, 200


@dataclass(frozen=True, slots=True)
class Cell:
    """One value of a binary or image-struct column."""

    path: str
    group: int
    row: int
    column: str

    def read(self) -> bytes:
        """Return the bytes in the cell; its column of the row group is cached.

        Raises:
            OSError: if the file cannot be read, or the cell holds no bytes.
        """
        values = _column(_Place(self.path, files.version(self.path), self.group, self.column))
        data = values[self.row].as_py() if self.row < len(values) else None
        if not isinstance(data, bytes):
            raise OSError("the cell holds no bytes")
        return data


class _Place(NamedTuple):
    """A column of one row group of one version of a file."""

    path: str
    version: tuple[int | str, ...]
    group: int
    column: str


_column_cache: OrderedDict[_Place, Any] = OrderedDict()
_lock = threading.Lock()


def _column(place: _Place) -> Any:
    with _lock:
        if place in _column_cache:
            _column_cache.move_to_end(place)
            return _column_cache[place]
        return _read_column(place)


def _read_column(place: _Place) -> Any:
    try:
        values = (
            _images(place.path, place.version)
            .read_row_group(place.group, columns=[place.column])
            .column(place.column)
        )
    except (arrow().ArrowException, OSError, IndexError, KeyError) as error:
        if isinstance(error, OSError):
            files.note_failure(error)
        raise OSError(f"{place.path}: {str(error)[:200]}") from None
    values = values.combine_chunks() if values.num_chunks != 1 else values.chunk(0)
    # Hugging Face's bytes and path: null where either the struct or its bytes are
    if arrow().types.is_struct(values.type):
        values = values.flatten()[values.type.get_field_index("bytes")]
    _column_cache[place] = values
    while (
        len(_column_cache) > 1
        and sum(column.nbytes for column in _column_cache.values()) > CACHE_BYTES
    ):
        _column_cache.popitem(last=False)
    return values


@lru_cache(maxsize=64)
def _file(path: str, version: tuple[int | str, ...]) -> pyarrow.parquet.ParquetFile:
    """Open a table, again whenever the file is replaced."""
    return arrow().parquet.ParquetFile(files.local(path))


@lru_cache(maxsize=64)
def _images(path: str, version: tuple[int | str, ...]) -> pyarrow.parquet.ParquetFile:
    """Open the same table with images dictionary-encoded, as they are stored.

    An image that a million rows share is then kept once.
    """
    file = _file(path, version)
    kinds = {field.name: field.type for field in file.schema_arrow if _is_bytes(field.type)}
    once = [
        f"{name}.bytes" if arrow().types.is_struct(kind) else name for name, kind in kinds.items()
    ]
    return arrow().parquet.ParquetFile(
        files.local(path), metadata=file.metadata, read_dictionary=once
    )


@dataclass(frozen=True)
class Parquet(Source):
    """A .parquet file or a folder of them: a column of images (bytes, or Hugging Face's struct of
    bytes and path), others beside it.

    Attributes:
        path: file, folder of files or URL.
    """

    is_of_files: ClassVar[bool] = True

    path: str

    def listing(self) -> Listing:
        """List the rows of all tables, with their known columns; images are read later.

        Raises:
            DataError: if there is no such file or folder, or a table is damaged, or there are no
                rows.
        """
        if not files.exists(self.path):
            raise DataError(
                "no such file or folder",
                where=self.path,
                hint="check the path; it is relative to where you run sfumato",
            )
        root = self.path.rstrip("/")
        names, passed_over = (
            files.explore(root) if files.is_folder(self.path) else files.Walk([], [])
        )
        tables = (
            [name for name in names if name.lower().endswith(".parquet")]
            if files.is_folder(self.path)
            else [""]
        )
        held = held_out_files(tables)
        rejects = [
            Reject(printable_name(name), "a file next to the tables")
            for name in names
            if name not in set(tables)
        ]
        rejects += [Reject(printable_name(name), reason) for name, reason in passed_over]

        def rows_of(table: str) -> _Rows:
            prefix = f"{printable_name(table)}:" if table else ""
            return _list(f"{root}/{table}" if table else self.path, prefix, held.get(table))

        # the names of a table's rows begin with its own, so that no two tables share one
        parts = in_parts(lambda table: rows_of(table).coded(), tables) or [
            rows_of(table) for table in tables
        ]
        entries = _joined([part.entries for part in parts])
        count = len(rejects) + sum(part.total for part in parts)
        unused = set[str]().union(*(part.unused for part in parts))
        rejects += [reject for part in parts for reject in part.rejects]
        if not entries:
            reasons = "; ".join(f"{reject.name}: {reject.reason}" for reject in rejects[:3])
            raise DataError(
                "holds no rows" + (f" that can be read ({reasons})" if reasons else ""),
                where=self.path,
                hint="name a .parquet file or the folder that holds them",
            )
        remarks = (
            [
                "columns that are not used: "
                f"{', '.join(map(printable_name, sorted(unused)[:12]))[:300]}"
            ]
            if unused
            else []
        )
        remarks += (
            [f"held out by the table's name: {', '.join(map(printable_name, held))[:300]}"]
            if held
            else []
        )
        return Listing(
            entries=entries,
            rejects=rejects,
            unit="rows",
            total=count,
            remarks=tuple(remarks),
        )


class _Rows(NamedTuple):
    """The rows of a table: as entries or columns, what is left out, their number, and the columns that
    are not used.
    """

    entries: Sequence[Entry] | pyarrow.Table
    rejects: list[Reject]
    total: int
    unused: set[str]

    def coded(self) -> _Rows:
        """Return the same with entries as columns."""
        return self._replace(entries=encode_part(self.entries))


def _joined(parts: Sequence[Any]) -> Sequence[Entry]:
    """Return the entries of tables, which are lists, or columns in all of them."""
    if all(isinstance(part, list) for part in parts):
        return list(chain.from_iterable(parts))
    return joined(parts)


def _list(path: str, prefix: str, holdout: str | None) -> _Rows:
    """List a table's rows, each under a unique name."""
    entries: dict[str, Entry] = {}
    rejects: list[Reject] = []
    try:
        file = _file(path, files.version(path))
        columns = _Columns.of(file.schema_arrow, path)
        room = max(64 << 20, MAX_RATIO * files.local(path).stat().st_size)
        for group in range(file.num_row_groups):
            _check_group(file.metadata, group, path)
            for row, record in enumerate(_records(file, group, columns.metadata)):
                name = prefix + columns.name(record)
                if name == prefix or name in entries:
                    name += ("" if name == prefix else "#") + f"{group:05d}-{row:05d}"
                try:
                    entry = columns.entry(name, path, group, row, record)
                    entries[name] = (
                        entry
                        if holdout is None or entry.holdout
                        else replace(entry, holdout=holdout)
                    )
                    room -= len(name) + sum(map(len, entries[name].captions))
                except ValueError as error:
                    rejects.append(Reject(name, str(error)))
                if room < 0:
                    raise ValueError(f"its texts unpack to over {MAX_RATIO} times its size")
        unused = set(file.schema_arrow.names) - columns.used
        return _Rows(list(entries.values()), rejects, file.metadata.num_rows, unused)
    except (arrow().ArrowException, OSError, ValueError, KeyError, OverflowError) as error:
        raise DataError(
            f"is not a complete parquet: {str(error)[:200]}",
            where=path,
            hint="download or recreate it",
        ) from None


def _check_group(metadata: Any, group: int, path: str) -> None:
    row_group = metadata.row_group(group)
    if row_group.total_byte_size > MAX_GROUP_BYTES:
        raise DataError(
            f"row group {group} is over 2 GiB",
            where=path,
            hint="write it with row groups of at most 1,000 rows",
        )
    if metadata.num_rows > MAX_ROWS or not 0 <= row_group.num_rows <= MAX_ROWS:
        raise DataError(f"over {MAX_ROWS} rows", where=path, hint="split it into several files")


def _records(file: Any, group: int, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a group, a few at a time: a small file can hold very long columns."""
    for batch in file.iter_batches(BATCH, row_groups=[group], columns=columns):
        yield from batch.to_pylist()


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """What each column of a table is.

    Attributes:
        image: the images.
        annotations: columns of other images and of points.
        structs: those of them that are structs of bytes and path.
        metadata: all that describe images, as `read_row_group` names them.
        labels: names of ClassLabel columns.
    """

    image: str
    annotations: list[str]
    structs: list[str]
    metadata: list[str]
    labels: dict[str, list[str]]

    @classmethod
    def of(cls, schema: Any, path: str) -> _Columns:
        repeated = [name for name, count in Counter(schema.names).items() if count > 1]
        if repeated:
            raise DataError(
                f"has two columns {repeated[0][:80]!r}",
                where=path,
                hint="give each column a name of its own",
            )
        image = _image_column(schema, path)
        annotations = [
            name
            for name in ANNOTATION_FILES
            if name in schema.names and _is_bytes(schema.field(name).type)
        ]
        structs = [
            name
            for name in (image, *annotations)
            if arrow().types.is_struct(schema.field(name).type)
        ]
        texts = [
            name
            for name in schema.names
            if is_known_column(name) and name not in (image, *annotations)
        ]
        metadata = [*texts, *(f"{name}.path" for name in structs)]
        return cls(
            image=image,
            annotations=annotations,
            structs=structs,
            metadata=metadata,
            labels=_label_names(schema),
        )

    @property
    def used(self) -> set[str]:
        """The names of the columns that are read."""
        return {
            self.image,
            *self.annotations,
            *(name for name in self.metadata if not name.endswith(".path")),
        }

    def name(self, record: dict[str, Any]) -> str:
        """Return the row's own name for its image, or ""."""
        inner = (record.get(self.image) or {}) if self.image in self.structs else {}
        return printable_name(str(inner.get("path") or ""))

    def entry(self, name: str, path: str, group: int, row: int, record: dict[str, Any]) -> Entry:
        for key, labels in self.labels.items():
            if isinstance(record.get(key), int) and 0 <= record[key] < len(labels):
                record[key] = labels[record[key]]
        annotations: dict[str, Any] = {
            annotation: Cell(path, group, row, annotation)
            for annotation in self.annotations
            if annotation not in self.structs or record.get(annotation) is not None
        }
        texts = {
            key: value
            for key, value in record.items()
            if is_known_column(key) and key != self.image
        }
        return Entry(
            name=name,
            image=Cell(path, group, row, self.image),
            **annotations,
            **parse_annotations(texts),
        )


def _is_bytes(kind: Any) -> bool:
    types = arrow().types
    if types.is_struct(kind):
        return any(field.name == "bytes" and _is_bytes(field.type) for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _image_column(schema: Any, path: str) -> str:
    candidates = [name for name in schema.names if _is_bytes(schema.field(name).type)]
    named = [name for name in IMAGE_COLUMNS if name in candidates]
    others = [name for name in candidates if name not in ANNOTATION_FILES]
    if not named and len(others) != 1:
        columns = ", ".join(f"{name} ({schema.field(name).type})" for name in schema.names)
        wrong = next(
            (name for name in IMAGE_COLUMNS if name in schema.names and name not in candidates),
            None,
        )
        advice = "name the column of encoded images `image`"
        if wrong is not None:
            kind = schema.field(wrong).type
            advice = f"column {wrong} must hold encoded images (bytes, or a struct of bytes and path), not {kind}"
        raise DataError(f"its columns are {columns[:300]}", where=path, hint=advice)
    return (named or others)[0]


def _label_names(schema: Any) -> dict[str, list[str]]:
    """Return the names of ClassLabel columns' classes, from Hugging Face's metadata."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"][
            "features"
        ]
        return {
            name: [str(label) for label in feature["names"]]
            for name, feature in features.items()
            if isinstance(feature, dict)
            and feature.get("_type") == "ClassLabel"
            and isinstance(feature.get("names"), list)
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def rows(data: bytes) -> Iterator[dict[str, Any]]:
    """Yield the rows of a small table given as bytes, such as metadata.parquet.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        file = arrow().parquet.ParquetFile(io.BytesIO(data))
        schema = file.schema_arrow
        columns = [
            name
            for name in schema.names
            if is_known_column(name) or _names_files(name, schema.field(name).type)
        ]
        for group in range(file.num_row_groups):
            _check_group(file.metadata, group, "metadata.parquet")
            yield from _records(file, group, columns)
    except (arrow().ArrowException, KeyError, OverflowError) as error:
        raise ValueError(str(error)[:200]) from None


def _names_files(name: str, kind: Any) -> bool:
    """Return whether a column may hold names of files."""
    types = arrow().types
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind)
    return name.endswith("file_name") or (normalized_key(name) in FILE_KEYS and bool(text))


def _cell(name: str, value: Any) -> Any:
    if name == "attributes":
        return json.dumps(value, ensure_ascii=False) if value else None
    return list(value) if name == "captions" else value


class TableWriter:
    """A writer of structs of bytes and path, and of texts, in the layout of Hugging Face's
    `datasets`; the same values give the same bytes.
    """

    def __init__(self, path: Path, *, images: tuple[str, ...], texts: tuple[str, ...]) -> None:
        pa = arrow()
        value, number = ({"dtype": name, "_type": "Value"} for name in ("string", "int64"))
        values = {"captions": {"feature": value, "_type": "List"}, REPEATS_KEY: number}
        features: dict[str, Any] = {name: {"_type": "Image"} for name in images if name != "points"}
        features |= {name: values.get(name, value) for name in texts}
        struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        kinds = {"captions": pa.list_(pa.string()), REPEATS_KEY: pa.int64()}
        fields = [
            *((name, struct) for name in images),
            *((name, kinds.get(name, pa.string())) for name in texts),
        ]
        self.schema = pa.schema(
            fields, metadata={"huggingface": json.dumps({"info": {"features": features}})}
        )
        self.images, self.texts = images, texts
        self._writer = pa.parquet.ParquetWriter(
            path, self.schema, compression="none", use_dictionary=False, write_statistics=False
        )

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Write one row group; each row has encoded bytes by image column, a "name", and texts."""
        columns: dict[str, list[Any]] = {
            name: [
                {"bytes": row[name], "path": row["name"] if name == "image" else None}
                if name in row
                else None
                for row in rows
            ]
            for name in self.images
        }
        columns |= {name: [_cell(name, row[name]) for row in rows] for name in self.texts}
        self._writer.write_table(
            arrow().table(columns, schema=self.schema), row_group_size=len(rows)
        )

    def close(self) -> None:
        """Write the footer, and close the file."""
        self._writer.close()
