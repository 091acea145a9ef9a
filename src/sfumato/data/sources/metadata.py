"""Tables that name images and describe them, as people write them: .csv, .tsv, .txt, .json, .jsonl
and .parquet.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sfumato.data.file_types import ANNOTATION_FILES, SUFFIXES
from sfumato.data.files import UnsafePath, check_relative
from sfumato.data.listing import CAPTION_KEYS, MAX_TEXT_CHARACTERS, is_known_column, normalized_key
from sfumato.data.sources import kohya
from sfumato.data.text_encoding import decode_text

# What the column of file names is called, in order of preference.
FILE_KEYS = (
    "file_name",
    "filename",
    "file",
    "image_file_name",
    "image_file",
    "image_filename",
    "image_path",
    "file_path",
    "filepath",
    "path",
    "image",
    "img",
    "image_id",
    "image_name",
    "img_path",
    "img_name",
    "id",
    "name",
    "key",
)
DELIMITERS = (",", ";", "\t", "|")
NAMES = frozenset(
    {
        "metadata",
        "captions",
        "caption",
        "labels",
        "annotations",
        "prompts",
        "tags",
        "data",
        "dataset",
        "index",
        "results_20130124",
        *kohya.METADATA,
    }
)
SUFFIXES_OF_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".json", ".txt")
MAX_METADATA_BYTES = 2 << 30
MAX_COLUMNS = 4096
LINES_OF_A_ROW = 50  # that a quoted text may span


class MetadataRow(NamedTuple):
    """A row of a table: its place, its columns by name, and what is wrong with it, "" if nothing
    is.
    """

    place: str
    record: dict[str, Any]
    fault: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """What a file of metadata says.

    Attributes:
        name: of the file.
        rows: as they stand.
        file_column: the column that names images, None if there is none.
        unused: columns that say nothing that a model reads.
    """

    name: str
    rows: list[MetadataRow]
    file_column: str | None
    unused: tuple[str, ...]


def is_authoritative(name: str) -> bool:
    """Return whether a file is called metadata.csv, .jsonl, .parquet, .tsv or .json.

    Such a file decides which images there are, as in Hugging Face's ImageFolder.
    """
    base = name.rpartition("/")[2].lower()
    return base in (
        "metadata.csv",
        "metadata.jsonl",
        "metadata.parquet",
        "metadata.tsv",
        "metadata.json",
    )


def may_be_table(name: str) -> bool:
    """Return whether a file may be a table of images, by its name.

    Any .csv and the like may be one; .json and .txt only if they have a usual name.
    """
    base = name.rpartition("/")[2].lower()
    stem, dot, ending = base.rpartition(".")
    if not dot or f".{ending}" not in SUFFIXES_OF_TABLES or base == "dataset.json":
        return False
    return ending not in ("json", "txt") or stem in NAMES


def read_table(name: str, data: bytes) -> Table:
    """Read the rows of a table.

    Raises:
        ValueError: if the file as a whole is damaged.
    """
    ending = name.lower().rpartition(".")[2]
    if ending == "parquet":
        from sfumato.data.sources.parquet import rows

        records = list(rows(data))
        table_rows = [
            MetadataRow(f"{name}, row {number}", record) for number, record in enumerate(records, 1)
        ]
        return _table(name, table_rows, list(records[0]) if records else [])
    text = decode_text(data, limit=MAX_METADATA_BYTES)
    if ending in ("jsonl", "ndjson"):
        table_rows = [
            _json_row(f"{name}, line {number}", line)
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
        return _table(name, table_rows, [key for row in table_rows[:100] for key in row.record])
    if ending == "json":
        table_rows = [
            MetadataRow(f"{name}, item {number}", record)
            for number, record in enumerate(_json_records(json.loads(text)), 1)
        ]
        return _table(name, table_rows, [key for row in table_rows[:100] for key in row.record])
    return _read_separated(name, text)


def _table(name: str, rows: list[MetadataRow], columns: Sequence[str]) -> Table:
    columns = list(dict.fromkeys(columns))
    file_column = file_column_of(columns)
    annotations = {f"{name}_file_name" for name in ANNOTATION_FILES}
    unused = [
        column
        for column in columns
        if column != file_column and not is_known_column(column) and column not in annotations
    ]
    return Table(name=name, rows=rows, file_column=file_column, unused=tuple(unused))


def file_column_of(columns: Sequence[str]) -> str | None:
    """Return the column that names images; None if there is none."""
    by_key = {normalized_key(column): column for column in reversed(columns)}
    return next((by_key[key] for key in FILE_KEYS if key in by_key), None)


def _json_row(place: str, line: str) -> MetadataRow:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return MetadataRow(place, {}, f"not JSON: {str(error)[:100]}")
    return (
        MetadataRow(place, record)
        if isinstance(record, dict)
        else MetadataRow(place, {}, "not a JSON object")
    )


def _json_records(value: Any) -> Iterator[dict[str, Any]]:
    """Yield the objects of a list, or captions or objects by file name, as taggers write them."""
    if isinstance(value, list):
        yield from (item for item in value if isinstance(item, dict))
    elif isinstance(value, dict):
        for name, item in value.items():
            if isinstance(item, str):
                yield {"file_name": name, "caption": item}
            elif isinstance(item, list) and item and all(isinstance(text, str) for text in item):
                yield {"file_name": name, "captions": item}
            elif isinstance(item, dict):
                yield {"file_name": name} | item


def _read_separated(name: str, text: str) -> Table:
    """Read a table whose columns are separated by commas, semicolons, tabs or bars.

    The separator is the one that gives the header the most known columns.
    """
    csv.field_size_limit(min(sys.maxsize, MAX_TEXT_CHARACTERS))
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    first = next((number for number, line in enumerate(lines) if line.strip()), None)
    if first is None:
        return _table(name, [], [])
    headers = {delimiter: _fields(lines, first, delimiter)[0] for delimiter in DELIMITERS}
    if max(map(len, headers.values())) > MAX_COLUMNS:
        raise ValueError(f"more than {MAX_COLUMNS} columns")
    delimiter = max(
        DELIMITERS,
        key=lambda d: (
            file_column_of(headers[d]) is not None,
            sum(map(is_known_column, headers[d])),
            len(headers[d]),
        ),
    )
    header = [column.strip() for column in headers[delimiter]]
    caption_index = next(
        (i for i, column in enumerate(header) if normalized_key(column) in CAPTION_KEYS),
        len(header) - 1,
    )
    rows, number = [], first + 1
    while number < len(lines):
        place = f"{name}, line {number + 1}"
        if lines[number].strip():
            fields, taken = _fields(lines, number, delimiter)
            rows.append(_row(place, header, caption_index, fields, delimiter))
        else:
            taken = 1
        number += taken
    return _table(name, rows, header)


def _fields(lines: Sequence[str], first: int, delimiter: str) -> tuple[list[str], int]:
    """Return the fields of the row that begins at line `first`, and how many lines it takes.

    A quoted text may continue over several lines; one whose quotation mark is never closed properly
    ends with its own line.
    """
    spaced = f'{delimiter} "' in lines[first]  # a space before a quotation mark
    for taken in range(1, min(LINES_OF_A_ROW, len(lines) - first) + 1):
        block = [f"{line}\n" for line in lines[first : first + taken]]
        try:
            rows = list(
                csv.reader(block, delimiter=delimiter, strict=True, skipinitialspace=spaced)
            )
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                continue
            break
        if len(rows) == 1:
            return rows[0], taken
        break
    try:
        return next(
            iter(csv.reader([lines[first]], delimiter=delimiter, quoting=csv.QUOTE_NONE)), []
        ), 1
    except csv.Error:  # a field of more than MAX_TEXT_CHARACTERS
        return [], 1


def _row(
    place: str, header: Sequence[str], caption_index: int, fields: list[str], delimiter: str
) -> MetadataRow:
    """Return a row by column.

    If there are more fields than columns, the caption held unquoted delimiters, and is joined
    again.
    """
    if not fields:
        return MetadataRow(place, {}, f"a text of more than {MAX_TEXT_CHARACTERS >> 10} KiB")
    extra = len(fields) - len(header)
    if extra > 0:
        if not header or normalized_key(header[caption_index]) not in CAPTION_KEYS:
            return MetadataRow(
                place, {}, f"{len(fields)} fields where the header has {len(header)} columns"
            )
        fields = [
            *fields[:caption_index],
            delimiter.join(fields[caption_index : caption_index + extra + 1]),
            *fields[caption_index + extra + 1 :],
        ]
    return MetadataRow(place, dict(zip(header, fields, strict=False)))


class Finder:
    """A lookup of images by the names that metadata give them."""

    def __init__(self, names: Sequence[str], check: Callable[[str], str]) -> None:
        """Index `names`, which are all files; `check` raises UnsafePath for links to elsewhere."""
        self._known, self._check = frozenset(names), check
        self._bare: dict[str, str | None] = {}
        for name in names:
            base = name.rpartition("/")[2]
            self._bare[base] = None if base in self._bare else name

    def find(self, value: Any, folder: str) -> str:
        r"""Return the file that `value`, written in a table in `folder`, names.

        `0.png`, `./0.png`, `.\0.png` and `0` without its ending are taken for the same. A bare name
        that is not in the table's own folder may be in any folder, if only one file has it.

        Raises:
            UnsafePath: if it leads elsewhere, or there is no such file.
        """
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            raise UnsafePath("its file name is not text")
        plain = value.strip().replace("\\", "/")
        while plain.startswith("./"):
            plain = plain[2:]
        check_relative(plain)
        for candidate in self._candidates(plain, folder):
            if candidate in self._known:
                return self._check(candidate)
        raise UnsafePath(f"{value[:80]!r} does not exist")

    def _candidates(self, plain: str, folder: str) -> Iterator[str]:
        below = f"{folder}/{plain}" if folder else plain
        yield below
        yield plain
        yield from (below + suffix for suffix in SUFFIXES)
        if "/" not in plain:
            yield from (
                name for end in ("", *SUFFIXES) if (name := self._bare.get(plain + end)) is not None
            )
