"""Parquet with pictures inside, as Hugging Face writes it. The only file here that knows pyarrow."""

from __future__ import annotations

import io
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.data import files
from sfumato.data.entry import CATEGORY_KEYS, Entry, Listing, described, legible
from sfumato.errors import DataError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "picture", "image_bytes")
CACHE_BYTES = 512 << 20  # of row groups kept in memory by each process
MAX_GROUP_BYTES = 2 << 30


def arrow() -> Any:
    """pyarrow.

    Raises:
        DataError: if it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError("parquet needs the package pyarrow", where="data", mend="pip install 'sfumato[parquet]'") from None
    return pyarrow


@dataclass(frozen=True, slots=True)
class Cell:
    """One value of a binary or image-struct column."""

    path: str
    group: int
    row: int
    column: str

    def read(self) -> bytes:
        data = _column(self.path, self.group, self.column)[self.row].as_py()
        if not isinstance(data, bytes):
            raise OSError("the cell holds no bytes")
        return data


_kept: OrderedDict[tuple[str, int, str], Any] = OrderedDict()
_lock = threading.Lock()


def _column(path: str, group: int, column: str) -> Any:
    key = (path, group, column)
    with _lock:
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
        return _read_column(key)


def _read_column(key: tuple[str, int, str]) -> Any:
    path, group, column = key
    try:
        values = _file(str(files.local(path))).read_row_group(group, columns=[column]).column(column)
    except (arrow().ArrowException, OSError) as error:
        raise OSError(f"{path}: {str(error)[:200]}") from None
    values = values.combine_chunks() if values.num_chunks != 1 else values.chunk(0)
    if arrow().types.is_struct(values.type):  # Hugging Face's bytes and path: null where either the struct or its bytes are
        values = values.flatten()[values.type.get_field_index("bytes")]
    _kept[key] = values
    while len(_kept) > 1 and sum(kept.nbytes for kept in _kept.values()) > CACHE_BYTES:
        _kept.popitem(last=False)
    return values


@lru_cache(maxsize=64)
def _file(path: str) -> pyarrow.parquet.ParquetFile:
    return arrow().parquet.ParquetFile(path)


@dataclass(frozen=True)
class Parquet:
    """A .parquet file or a folder of them: a column of pictures (bytes, or Hugging Face's struct of bytes and path), others beside it."""

    path: str

    def listing(self) -> Listing:
        if not files.exists(self.path):
            raise DataError(
                "no such file or folder", where=self.path, mend="check the path; it is relative to where you run sfumato"
            )
        root = self.path.rstrip("/")
        tables = (
            [f"{root}/{n}" for n in files.walk(root) if n.endswith(".parquet")] if files.is_folder(self.path) else [self.path]
        )
        entries: list[Entry] = []
        for table in tables:
            prefix = "" if table == self.path else f"{legible(table.rpartition('/')[2])}:"
            entries += _entries(table, prefix)
        if not entries:
            raise DataError("holds no rows", where=self.path, mend="name a .parquet file or the folder that holds them")
        return Listing(entries, [])


def _entries(path: str, prefix: str) -> Iterator[Entry]:
    try:
        file = _file(str(files.local(path)))
        schema = file.schema_arrow
        image = _image_column(schema, path)
        names = _label_names(schema)
        blobs = [
            column for column in ("doodle", "mask", "points") if column in schema.names and _is_bytes(schema.field(column).type)
        ]
        others = [
            name for name in schema.names if name != image and name not in blobs and not _is_bytes(schema.field(name).type)
        ]
        paths = [f"{image}.path"] if arrow().types.is_struct(schema.field(image).type) else []
        for group in range(file.num_row_groups):
            if file.metadata.row_group(group).total_byte_size > MAX_GROUP_BYTES:
                raise DataError(
                    f"row group {group} is over 2 GiB", where=path, mend="write it with row groups of at most 1,000 rows"
                )
            known = file.read_row_group(
                group, columns=[*others, *paths, *(blobs and [f"{b}.path" for b in blobs if not _flat(schema, b)])]
            )
            for row, record in enumerate(known.to_pylist()):
                inner = (record.pop(image, None) or {}) if paths else {}
                name = inner.get("path") or f"{group:05d}-{row:05d}"
                for key in CATEGORY_KEYS:
                    if key in names and isinstance(record.get(key), int) and 0 <= record[key] < len(names[key]):
                        record[key] = names[key][record[key]]
                layers: dict[str, Any] = {
                    blob: Cell(path, group, row, blob) for blob in blobs if _flat(schema, blob) or record.get(blob) is not None
                }
                yield Entry(
                    name=prefix + legible(str(name)), image=Cell(path, group, row, image), **layers, **described(record)
                )
    except (arrow().ArrowException, OSError, ValueError) as error:
        raise DataError(f"is no whole parquet: {str(error)[:200]}", where=path, mend="fetch or make it again") from None


def _is_bytes(kind: Any) -> bool:
    types = arrow().types
    if types.is_struct(kind):
        return any(field.name == "bytes" and _is_bytes(field.type) for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _flat(schema: Any, column: str) -> bool:
    return not arrow().types.is_struct(schema.field(column).type)


def _image_column(schema: Any, path: str) -> str:
    candidates = [name for name in schema.names if _is_bytes(schema.field(name).type)]
    named = [name for name in IMAGE_COLUMNS if name in candidates]
    rest = [name for name in candidates if name not in ("doodle", "mask", "points")]
    if not named and len(rest) != 1:
        raise DataError(
            f"its columns are {', '.join(schema.names)[:300]}", where=path, mend="name the column of pictures `image`"
        )
    return (named or rest)[0]


def _label_names(schema: Any) -> dict[str, list[str]]:
    """Names of ClassLabel columns, from the metadata that Hugging Face writes."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {
            name: [str(label) for label in feature["names"]]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list)
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def rows(data: bytes) -> Iterator[dict[str, Any]]:
    """The rows of a small table given as bytes, such as metadata.parquet."""
    try:
        yield from arrow().parquet.read_table(io.BytesIO(data)).to_pylist()
    except arrow().ArrowException as error:
        raise ValueError(str(error)[:200]) from None


class TableWriter:
    """Writes structs of bytes and path, and texts, as Hugging Face's `datasets` does; the same values give the same bytes."""

    def __init__(self, path: Path, *, pictures: tuple[str, ...], texts: tuple[str, ...]) -> None:
        pa = arrow()
        value = {"dtype": "string", "_type": "Value"}
        features: dict[str, Any] = {name: {"_type": "Image"} for name in pictures if name != "points"}
        features |= {name: {"feature": value, "_type": "List"} if name == "captions" else value for name in texts}
        struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        kinds = {"captions": pa.list_(pa.string())}
        fields = [*((name, struct) for name in pictures), *((name, kinds.get(name, pa.string())) for name in texts)]
        self.schema = pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})
        self.pictures, self.texts = pictures, texts
        self._writer = pa.parquet.ParquetWriter(
            path, self.schema, compression="none", use_dictionary=False, write_statistics=False
        )

    def write(self, rows: list[dict[str, Any]]) -> None:
        """One row group, from the encoded bytes by picture's name, "name", and texts."""
        columns: dict[str, list[Any]] = {
            name: [
                {"bytes": row[name], "path": row["name"] if name == "image" else None} if name in row else None for row in rows
            ]
            for name in self.pictures
        }
        columns |= {name: [list(row[name]) if name == "captions" else row[name] for row in rows] for name in self.texts}
        self._writer.write_table(arrow().table(columns, schema=self.schema), row_group_size=len(rows))

    def close(self) -> None:
        """End the file."""
        self._writer.close()
