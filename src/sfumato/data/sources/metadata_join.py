"""What metadata say of the images of a set: tables of any usual name and form, and EDM's
dataset.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

from sfumato.data.file_types import ANNOTATION_FILES, stem_of
from sfumato.data.files import UnsafePath
from sfumato.data.listing import MAX_BYTES, Blob, Reject, parse_annotations, printable_name
from sfumato.data.sources import kohya
from sfumato.data.sources.file_status import KINDS, FileStatus
from sfumato.data.sources.metadata import (
    Finder,
    MetadataRow,
    Table,
    is_authoritative,
    may_be_table,
    read_table,
)
from sfumato.errors import DataError

MAX_TABLE_BYTES = 64 << 20  # of a table that is not called metadata
UNNAMED = "not named in the metadata"
ROWS_TRIED, MOST_TABLES = 50, 100


class MetadataFacts(NamedTuple):
    """What metadata say of images, by the image's name, and whether they include categories."""

    facts: dict[str, dict[str, Any]]
    categories: bool


@dataclass(kw_only=True)
class Metadata:
    """The metadata of a set.

    Attributes:
        where, names, blob, check, check_text, unnamed: as of the `ImageFolderReader` of the set.
        status: of the tree's files.
    """

    where: str
    names: Sequence[str]
    blob: Callable[[str], Blob]
    check: Callable[[str], str]
    check_text: Callable[[str], str]
    unnamed: Literal["leave_out", "use"]
    status: FileStatus
    _facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    _annotation_files: dict[str, str] = field(
        default_factory=dict
    )  # annotation files that tables name, by kind

    @cached_property
    def _finder(self) -> Finder:
        return Finder(self.names, self.check)

    def read(self, images: Sequence[str], annotations: Mapping[str, str]) -> MetadataFacts:
        """Return what the metadata say of `images`.

        Args:
            annotations: files that are known to belong to an image, with the image's stem.
        Raises:
            DataError: if files that are called metadata are damaged, of several kinds, or name no
                image that exists, or if dataset.json is damaged.
        """
        stems = {stem_of(name) for name in images}
        candidates = [
            name
            for name in self.names
            if may_be_table(name) and name not in annotations and stem_of(name) not in stems
        ]
        decisive = [name for name in self.names if is_authoritative(name)]
        if len({name.rpartition(".")[2].lower() for name in decisive}) > 1:
            raise DataError(
                f"metadata files of several kinds: {', '.join(decisive[:3])}",
                where=self.where,
                hint="keep one kind of them",
            )
        for name in decisive or candidates[:MOST_TABLES]:
            self._by_table(name, decisive=bool(decisive))
        for name in self._annotation_files.keys() - self._facts.keys():
            self.status.count(name, KINDS[self._annotation_files[name]])
        if decisive:
            self._leave_out_unnamed(images, UNNAMED)
        for name in [name for name in self.names if name.rpartition("/")[2] == "dataset.json"][:1]:
            self._by_dataset_json(name, images)
        return MetadataFacts(
            self._facts, categories=any("category" in facts for facts in self._facts.values())
        )

    def _by_table(self, name: str, *, decisive: bool) -> None:
        """Add what a table says. One that is not called metadata counts only if it names images."""
        try:
            data = self.blob(self.check_text(name)).read()
            if not decisive and len(data) > MAX_TABLE_BYTES:
                raise ValueError(f"more than {MAX_TABLE_BYTES >> 20} MiB")
            if len(data) > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
            table = read_table(name, data)
        except (OSError, ValueError, RecursionError, UnsafePath) as error:
            if decisive:
                raise DataError(
                    f"{name} cannot be read: {str(error)[:200]}", where=self.where,
                    hint="repair or remove that file, or set data.source.metadata=off",
                ) from None  # fmt: skip
            self.status.leave_out(name, f"a table that cannot be read: {str(error)[:100]}")
            return
        if kohya.is_metadata(name):
            names = frozenset(self.names)
            rows = [row._replace(record=kohya.read_record(row.record, names)) for row in table.rows]
            table = replace(table, rows=rows)
        folder = name.rpartition("/")[0]
        if not decisive and not _names_some(table, self._finder, folder):
            return  # its fate is that of any other file
        before, faults = len(self._facts), len(self.status.rejects)
        for row in table.rows:
            self._row(row, table.file_column, folder)
        if decisive and len(self._facts) == before:
            self._refuse(table, self.status.rejects[faults:])
        self.status.count(name, "metadata")
        if table.unused:
            self.status.remarks.append(
                f"{name}: columns that are not used: "
                f"{', '.join(map(printable_name, table.unused[:12]))[:300]}"
            )

    def _refuse(self, table: Table, faults: Sequence[Reject]) -> None:
        reasons = (
            "; ".join(f"{reject.name}: {reject.reason}" for reject in faults[:3])
            or "it has no rows"
        )
        column = (
            "its column of file names is one of file_name, image, path, ..."
            if table.file_column is None
            else "check the names"
        )
        raise DataError(
            f"its metadata name no existing image ({reasons})", where=self.where,
            hint=f"{column}, or set data.source.metadata=off",
        )  # fmt: skip

    def _row(self, row: MetadataRow, column: str | None, folder: str) -> None:
        facts, find = self._facts, self._finder.find
        try:
            if row.fault:
                raise UnsafePath(row.fault)
            value = None if column is None else row.record.get(column)
            if value is None or value == "":
                raise UnsafePath(
                    f"has no file_name; its columns are {', '.join(map(str, row.record))[:200]}"
                )
            name = find(value, folder)
            row_facts = parse_annotations(row.record)
            annotations = {
                annotation: find(other, folder)
                for annotation in ANNOTATION_FILES
                if (other := row.record.get(f"{annotation}_file_name")) not in (None, "")
            }
            if name in facts:
                # several rows for an image are several captions
                if facts[name].get("captions") and row_facts.get("captions"):
                    facts[name]["captions"] = (*facts[name]["captions"], *row_facts["captions"])
                    return
                raise UnsafePath(f"{name[:80]!r} is named twice")
        except (UnsafePath, ValueError) as reason:
            self.status.rejects.append(Reject(printable_name(row.place), str(reason), part=True))
            return
        for annotation, other in annotations.items():
            self._annotation_files[other] = annotation
            row_facts[annotation] = self.blob(other)
        facts[name] = row_facts

    def _leave_out_unnamed(self, images: Sequence[str], reason: str) -> None:
        unnamed = [
            name for name in images if name not in self._facts and name not in self.status.resolved
        ]
        if not unnamed:
            return
        sentence = f"{len(unnamed)} images are not named in the metadata and are "
        if self.unnamed == "use":
            self.status.remarks.append(f"{sentence}trained without a caption")
            return
        for name in unnamed:
            self.status.leave_out(name, reason)
        self.status.remarks.append(
            f"{sentence}left out; data.source.unnamed=use trains them without a caption"
        )

    def _by_dataset_json(self, file: str, images: Sequence[str]) -> None:
        """Add the categories of EDM's and StyleGAN's label file.

        Any other file of that name is left out.
        """
        try:
            data = self.blob(file).read()
            if len(data) > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
            record = json.loads(data)
            if not isinstance(record, dict) or "labels" not in record:
                self.status.leave_out(
                    file,
                    'not a label file, which holds {"labels": [["00000/img00000000.png", 6], ...]}',
                )
                return
            folder = file.removesuffix("dataset.json")
            categories = {folder + str(name): str(label) for name, label in record["labels"] or []}
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise DataError(
                f"dataset.json cannot be read: {str(error)[:100]}",
                where=self.where,
                hint='it holds {"labels": [["00000/img00000000.png", 6], ...]} or {"labels": '
                "null}; or set data.source.metadata=off",
            ) from None
        self.status.count(file, "metadata")
        for name in images:
            if name in categories:
                self._facts.setdefault(name, {})["category"] = printable_name(categories[name])
        if categories:
            self._leave_out_unnamed(images, "not named in dataset.json")


def _names_some(table: Table, finder: Finder, folder: str) -> bool:
    """Return whether any of a table's first rows names a file that exists, and describes it."""
    if table.file_column is None:
        return False
    for row in table.rows[:ROWS_TRIED]:
        try:
            finder.find(row.record.get(table.file_column), folder)
            if parse_annotations(row.record):
                return True
        except (UnsafePath, ValueError):
            continue
    return False
