"""A folder of pictures, and everything that people put beside them. A zip is read as the folder that it holds.

cat.png  cat.txt | cat.caption | cat.json       a caption, or captions and category
cat.doodle.png  cat.mask.png  cat.points.npy    further layers
cats/cat.png                                    the category is the top-most folder's name
train/cats/cat.png  test/cats/dog.png           folders called like splits: all but `train` are kept from training
metadata.csv | .jsonl | .parquet                Hugging Face's ImageFolder: `file_name`, any other columns
dataset.json                                    EDM's: {"labels": [["00000/img00000000.png", 6], ...]}
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sfumato.data import files
from sfumato.data.decoding import SUFFIXES
from sfumato.data.entry import MAX_TEXT_BYTES, Blob, Entry, File, Listing, Reject, described, legible
from sfumato.data.files import UnsafePath
from sfumato.errors import DataError

SPLITS = {"train", "training", "test", "testing", "validation", "valid", "val", "dev"}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
MAX_METADATA_BYTES = 2 << 30
LAYERS = {"doodle": SUFFIXES, "mask": SUFFIXES, "points": (".npy", ".ply", ".xyz", ".csv")}


@dataclass(frozen=True)
class Folder:
    """A folder of pictures: flat, or one sub-folder for each category (pictures deeper down belong to the top-most one)."""

    path: str

    def listing(self) -> Listing:
        if not files.exists(self.path):
            raise DataError("no such folder", where=self.path, mend="check the path; it is relative to where you run sfumato")
        if not files.is_folder(self.path):
            raise DataError("is a file, not a folder", where=self.path, mend="name the folder that holds the pictures")
        root = self.path.rstrip("/")
        names = _outside_runs(files.walk(root))
        return Tree(self.path, names, lambda name: File(f"{root}/{name}"), lambda name: files.contained(root, name)).listing()


def _outside_runs(names: Sequence[str]) -> Sequence[str]:
    """Without what lies in runs' directories: `sfumato train .` puts them among the pictures, and would go on with its own samples."""
    known = set(names)
    places = {name.rpartition("/")[0] for name in names if name.endswith("/status.json")}
    runs = tuple(f"{place}/" for place in places if f"{place}/config.yaml" in known)
    return [name for name in names if not name.startswith(runs)]


@dataclass(frozen=True)
class Tree:
    """Files of a folder or archive by relative name.

    Attributes:
        where: the folder or archive, for messages.
        names: all files.
        blob: the place of a file's bytes.
        check: raises UnsafePath for a name, given by metadata, that leads elsewhere.
    """

    where: str
    names: Sequence[str]
    blob: Callable[[str], Blob]
    check: Callable[[str], str] = files.check_relative

    def listing(self) -> Listing:
        """Entries of all pictures."""
        known = set(self.names)
        pictures = [name for name in self.names if name.lower().endswith(SUFFIXES) and not _layer(name, known)]
        metadata = [name for name in self.names if name.rpartition("/")[2] in METADATA]
        if not pictures and not metadata:
            raise DataError(
                f"holds no pictures ({', '.join(SUFFIXES)})",
                where=self.where,
                mend="put pictures in it, or name another folder",
            )
        if metadata:
            return self._by_metadata(metadata, known)
        if "dataset.json" in known:
            return self._by_dataset_json(pictures, known)
        tops = {name.partition("/")[0] for name in pictures if "/" in name}
        split = bool(tops) and tops <= SPLITS and all("/" in name for name in pictures)
        depth = 1 if split else 0
        nested = any(name.count("/") > depth for name in pictures)
        rejects: list[Reject] = []
        entries = [self._entry(name, known, rejects, split=split, nested=nested) for name in pictures]
        return Listing(entries, rejects)

    def _entry(self, name: str, known: set[str], rejects: list[Reject], *, split: bool, nested: bool) -> Entry:
        parts = name.split("/")
        found: dict[str, Any] = {}
        if split and parts[0] not in ("train", "training"):
            found["holdout"] = parts[0]
        folders = parts[1:-1] if split else parts[:-1]
        if nested:
            found["category"] = legible(folders[0]) if folders else ""
        return self._with_sidecars(name, known, found, rejects)

    def _with_sidecars(self, name: str, known: set[str], found: dict[str, Any], rejects: list[Reject]) -> Entry:
        """The entry of a picture; what lies beside it is laid over what is known already."""
        stem = name.rpartition(".")[0]
        for suffix in (".txt", ".caption"):
            if stem + suffix in known and (text := self._text(stem + suffix, rejects)):
                found["captions"] = (*found.get("captions", ()), text)
        if stem + ".json" in known:
            found.update(self._json(stem + ".json", rejects))
        for layer, suffixes in LAYERS.items():
            beside = next((f"{stem}.{layer}{suffix}" for suffix in suffixes if f"{stem}.{layer}{suffix}" in known), None)
            if beside is not None:
                found[layer] = self.blob(beside)
        return Entry(name=legible(name), image=self.blob(name), **found)

    def _text(self, name: str, rejects: list[Reject]) -> str:
        try:
            return readable(self.blob(self.check(name)).read()).strip()
        except (OSError, ValueError, UnsafePath) as error:
            rejects.append(Reject(legible(name), f"caption left out: {error}"))
            return ""

    def _json(self, name: str, rejects: list[Reject]) -> dict[str, Any]:
        try:
            record = json.loads(readable(self.blob(self.check(name)).read()))
            if not isinstance(record, dict):
                raise ValueError("not a JSON object")
            return described(record)
        except (OSError, ValueError, RecursionError, UnsafePath) as error:
            rejects.append(Reject(legible(name), f"JSON left out: {str(error)[:100]}"))
            return {}

    def _by_dataset_json(self, pictures: Sequence[str], known: set[str]) -> Listing:
        """EDM's and StyleGAN's label file."""
        try:
            labels = json.loads(_capped(self.blob("dataset.json").read()))["labels"]
            categories = {str(name): str(label) for name, label in labels or []}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"dataset.json cannot be read: {str(error)[:100]}",
                where=self.where,
                mend='it holds {"labels": [["00000/img00000000.png", 6], ...]} or {"labels": null}',
            ) from None
        rejects: list[Reject] = []
        entries = []
        for name in pictures:
            if categories and name not in categories:
                rejects.append(Reject(legible(name), "not named in dataset.json"))
                continue
            found = {"category": legible(categories[name])} if categories else {}
            entries.append(self._with_sidecars(name, known, found, rejects))
        return Listing(entries, rejects)

    def _by_metadata(self, metadata: Sequence[str], known: set[str]) -> Listing:
        """Hugging Face's ImageFolder: each metadata file names pictures below its own folder."""
        if len({name.rpartition(".")[2] for name in metadata}) > 1:
            raise DataError(
                f"metadata files of several kinds: {', '.join(metadata[:3])}", where=self.where, mend="keep one kind of them"
            )
        entries: dict[str, Entry] = {}
        rejects: list[Reject] = []
        layers: set[str] = set()
        for file in metadata:
            folder = file.rpartition("/")[0]
            for number, row in enumerate(self._rows(file)):
                self._row(f"{file}, row {number + 1}", folder, row, known, entries, rejects, layers)
        unnamed = [
            n
            for n in self.names
            if n.lower().endswith(SUFFIXES) and n not in entries and n not in layers and not _layer(n, known)
        ]
        rejects += [Reject(legible(name), "not named in the metadata") for name in unnamed]
        if not entries:
            reasons = "; ".join(f"{reject.name}: {reject.reason}" for reject in rejects[:3])
            raise DataError(
                f"its metadata name no picture that is there ({reasons})", where=self.where, mend="the column is `file_name`"
            )
        return Listing([entries[name] for name in sorted(entries)], rejects)

    def _row(
        self,
        place: str,
        folder: str,
        row: dict[str, Any],
        known: set[str],
        entries: dict[str, Entry],
        rejects: list[Reject],
        layers: set[str],
    ) -> None:
        def named(column: str) -> str | None:
            value = row.get(column)
            if value is None or value == "":
                return None
            if not isinstance(value, str):
                raise UnsafePath(f"{column} is no text")
            path = self.check(f"{folder}/{files.check_relative(value)}" if folder else value)
            if path not in known:
                raise UnsafePath(f"{value[:80]!r} is not there")
            return path

        try:
            name = named("file_name") or named("image_file_name")
            if name is None:
                raise UnsafePath("has no file_name")
            if name in entries:
                raise UnsafePath(f"{name[:80]!r} is named twice")
            beside = {layer: other for layer in LAYERS if (other := named(f"{layer}_file_name")) is not None}
            facts = described(row)
        except (UnsafePath, ValueError) as reason:
            rejects.append(Reject(place, str(reason)))
            return
        layers.update(beside.values())
        found = {**facts, **{layer: self.blob(other) for layer, other in beside.items()}}
        top = name.partition("/")[0]
        if "holdout" not in found and "/" in name and top in SPLITS - {"train", "training"}:
            found["holdout"] = top
        entries[name] = self._with_sidecars(name, known, found, rejects)

    def _rows(self, name: str) -> Iterator[dict[str, Any]]:
        blob = self.blob(name)
        try:
            if name.endswith(".parquet"):
                from sfumato.data.sources.table import rows

                yield from rows(blob.read())
                return
            text = readable(_capped(blob.read()), limit=MAX_METADATA_BYTES)
            if name.endswith(".csv"):
                csv.field_size_limit(min(sys.maxsize, MAX_TEXT_BYTES))
                yield from csv.DictReader(io.StringIO(text, newline=""), strict=True)
            else:
                yield from (_record(line) for line in text.split("\n") if line.strip())
        except (OSError, ValueError, csv.Error, RecursionError) as error:
            raise DataError(f"{name} cannot be read: {str(error)[:200]}", where=self.where, mend="mend that file") from None


def _record(line: str) -> dict[str, Any]:
    record = json.loads(line)
    return record if isinstance(record, dict) else {}


def _layer(name: str, known: set[str]) -> bool:
    """Whether a picture, or an array, is a layer of another one."""
    stem, _, kind = name.rpartition(".")[0].rpartition(".")
    return kind in LAYERS and any(stem + suffix in known for suffix in (*SUFFIXES, *(s.upper() for s in SUFFIXES)))


def _capped(data: bytes) -> bytes:
    from sfumato.data.entry import MAX_BYTES

    if len(data) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
    return data


def readable(data: bytes, *, limit: int = MAX_TEXT_BYTES) -> str:
    """Text of unknown encoding: Unicode if it is, else Western European.

    Raises:
        ValueError: if it is longer than `limit` bytes.
    """
    if len(data) > limit:
        raise ValueError(f"text of more than {limit >> 10} KiB")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")
