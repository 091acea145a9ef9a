"""Conversion of any source to parquet or WebDataset shards; the same input gives the same bytes."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from sfumato.data import files
from sfumato.data.file_types import ANNOTATION_FILES, NUMPY, suffix_of
from sfumato.data.image_metadata import keeps_metadata, without_metadata
from sfumato.data.listing import MAX_BYTES, REPEATS_KEY, Blob, Entry, Listing, Reject
from sfumato.data.sources.npz import plain_array
from sfumato.errors import ConfigError, DataError
from sfumato.storage.atomic import commit

ROWS, ROW_BYTES = 100, 256 << 20  # of a parquet row group: what one random access reads
MAX_KEY_BYTES = 200  # leaves room for the endings
WHOLE = ", so that its metadata cannot be left out"  # of a damaged file
TEXTS = ("captions", "category", "attributes", "holdout")  # fields of an entry
PackedSample = dict[str, Any]


def convert(
    listing: Listing,
    dest: Path,
    *,
    to: str | None = None,
    shard_mib: int = 1000,
    keep_metadata: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_copied: Callable[[str], object] = lambda name: None,
) -> tuple[list[Path], list[Reject]]:
    """Write all samples; return the files written and everything that was left out.

    Left out is what the listing rejected, and samples whose bytes could not be read.

    Args:
        dest: a .parquet or .tar file, or a folder that gets files with about `shard_mib` of images
            each.
        to: "parquet" or "webdataset"; needed for a folder only.
        keep_metadata: whether Exif data and comments of images, which may say where a photo was
            taken, are kept.
        on_copied: called with the name of each image whose format has metadata that cannot be left
            out here, so that it is copied as it is.
    Raises:
        ConfigError, DataError: if the destination is of another kind, exists already or cannot be
            written, or if no sample can be read.
    """
    by_suffix = {suffix: kind for kind, suffix in SUFFIX.items()}.get(dest.suffix)
    kind, single = to or by_suffix, by_suffix is not None
    if kind not in SUFFIX or (single and kind != by_suffix):
        raise ConfigError(
            f"{to or dest.name!r} is not a supported container",
            where=str(dest),
            hint="use --to parquet or --to webdataset",
        )
    if dest.exists() and (single or not dest.is_dir() or any(dest.iterdir())):
        raise DataError(
            "exists already", where=str(dest), hint="name a new file or an empty folder"
        )
    rejects = list(listing.rejects)
    columns = TableColumns.of(listing.entries)
    try:
        (dest.parent if single else dest).mkdir(parents=True, exist_ok=True)
        samples = _pack(
            listing.entries, rejects, on_progress, on_copied, keep_metadata=keep_metadata
        )
        paths = _write_files(samples, dest, kind, columns, None if single else shard_mib << 20)
    except OSError as error:
        raise DataError(
            f"cannot be written: {error}",
            where=str(dest),
            hint="check the disk and the permissions",
        ) from None
    return paths, rejects


@dataclass(frozen=True, kw_only=True)
class TableColumns:
    """The annotations and texts that a table needs columns for."""

    annotations: tuple[str, ...]
    texts: tuple[str, ...]

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> TableColumns:
        """Return the annotations and texts that any of the entries has."""

        def present(names: Sequence[str]) -> tuple[str, ...]:
            return tuple(name for name in names if any(getattr(entry, name) for entry in entries))

        repeated = any(entry.repeats != 1 for entry in entries)
        return cls(
            annotations=present(tuple(ANNOTATION_FILES)),
            texts=(*present(TEXTS), *((REPEATS_KEY,) if repeated else ())),
        )


def _write_files(
    samples: Iterator[PackedSample], dest: Path, kind: str, columns: TableColumns, limit: int | None
) -> list[Path]:
    """Write samples to one file, or to files of at most `limit` bytes of images each.

    They get their final names once all of them are complete.
    """
    paths: list[Path] = []
    writer: Writer | None = None
    size = 0
    try:
        for sample in samples:
            if writer is None or (limit is not None and size + len(sample["image"]) > limit):
                if writer is not None:
                    writer.close()
                paths.append(
                    dest if limit is None else dest / f"data-{len(paths):06d}{SUFFIX[kind]}"
                )
                writer, size = WRITERS[kind](_temporary(paths[-1]), columns), 0
            writer.add(sample)
            size += len(sample["image"])
        if writer is None:
            raise DataError(
                "nothing could be read, so nothing was written",
                where=str(dest),
                hint="see `sfumato data check`",
            )
        writer.close()
        for path in paths:
            commit(_temporary(path), path)
    finally:
        for path in paths:
            _temporary(path).unlink(missing_ok=True)
    return paths


def _temporary(path: Path) -> Path:
    return path.with_name(f".tmp-{path.name}")


def _pack(
    entries: Sequence[Entry],
    rejects: list[Reject],
    on_progress: Callable[[int, int], None] | None,
    on_copied: Callable[[str], object],
    *,
    keep_metadata: bool,
) -> Iterator[PackedSample]:
    """Yield samples as plain data: encoded bytes as they are, 8-bit gray or RGB arrays as PNG.

    Metadata of images are left out unless they are kept.

    Samples that cannot be read are added to `rejects`.
    """
    for number, entry in enumerate(entries):
        try:
            sample = {"name": entry.name, **{name: getattr(entry, name) for name in TEXTS}}
            sample["attributes"] = dict(entry.attributes)
            sample[REPEATS_KEY] = entry.repeats
            for name in ("image", *ANNOTATION_FILES):
                blob = getattr(entry, name)
                if blob is not None:
                    data = _read(blob)
                    if name != "points" and not keep_metadata:
                        try:
                            data = without_metadata(data)
                            if keeps_metadata(data):
                                on_copied(entry.name)
                        except ValueError as error:
                            if name == "image":
                                raise OSError(f"{error}{WHOLE}") from None
                            rejects.append(
                                Reject(entry.name, f"its {name} {error}{WHOLE}", part=True)
                            )
                            continue
                    sample[name] = data if name == "points" else _as_image(data)
        except OSError as error:
            rejects.append(Reject(entry.name, str(error)))
        else:
            yield sample
        if on_progress is not None:
            on_progress(number + 1, len(entries))


def _read(blob: Blob) -> bytes:
    data = blob.read()
    if len(data) > MAX_BYTES:
        raise OSError(f"more than {MAX_BYTES >> 20} MiB")
    return data


def _as_image(data: bytes) -> bytes:
    if not data.startswith(NUMPY):
        return data
    try:
        values = plain_array(data)
    except ValueError as error:
        raise OSError(f"damaged: {error}") from None
    values = values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values
    # as PNG, 2 or 4 channels would come to have alpha
    plain = values.ndim == 2 or (values.ndim == 3 and values.shape[2] == 3)
    if values.dtype != np.uint8 or not plain:
        return data
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format="PNG")
    return buffer.getvalue()


class Writer(Protocol):
    """A writer of samples to one file."""

    def add(self, sample: PackedSample) -> None:
        """Append a sample: its name, encoded image and annotations as bytes, and texts."""
        ...

    def close(self) -> None:
        """Write what is buffered, and close the file."""
        ...


class _Tar:
    """A writer of a WebDataset shard."""

    def __init__(self, path: Path, columns: TableColumns) -> None:
        self._tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._keys: set[str] = set()
        self._columns = columns

    def add(self, sample: PackedSample) -> None:
        key = _key(sample["name"], len(self._keys), self._keys)
        members = [(suffix_of(sample["image"]), sample["image"])]
        members += [
            (f"{annotation}.{suffix_of(sample[annotation])}", sample[annotation])
            for annotation in ANNOTATION_FILES
            if annotation in sample
        ]
        facts = {name: sample[name] for name in self._columns.texts if sample[name]}
        if facts:
            members.append(("json", json.dumps(facts, ensure_ascii=False, sort_keys=True).encode()))
        for ending, data in sorted(members):
            info = tarfile.TarInfo(f"{key}.{ending}")
            # owner and time stay 0: the same data, the same bytes
            info.size, info.mode = len(data), 0o644
            self._tar.addfile(info, io.BytesIO(data))
        self._tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header

    def close(self) -> None:
        self._tar.close()


def _key(name: str, number: int, taken: set[str]) -> str:
    """Return a sample's name as a unique WebDataset key, without an ending or dots."""
    stem = name.rpartition(":")[2]
    stem = stem.rpartition(".")[0] or stem
    key = re.sub(r"[^\w/-]", "_", stem).strip("/_") or f"{number:08d}"
    key = "/".join(part.strip("_") or "0" for part in key.split("/"))
    if len(key.encode()) > MAX_KEY_BYTES or any(files.is_reserved(part) for part in key.split("/")):
        key = f"{number:08d}"
    while key in taken:
        key = f"{key}-{number:08d}"
    taken.add(key)
    return key


class _Parquet:
    """A writer of a table in the layout that Hugging Face's `datasets` writes."""

    def __init__(self, path: Path, columns: TableColumns) -> None:
        from sfumato.data.sources.parquet import TableWriter

        self._table = TableWriter(path, images=("image", *columns.annotations), texts=columns.texts)
        self._rows: list[PackedSample] = []
        self._size = 0

    def add(self, sample: PackedSample) -> None:
        self._rows.append(sample)
        self._size += sum(len(value) for value in sample.values() if isinstance(value, bytes))
        if len(self._rows) >= ROWS or self._size >= ROW_BYTES:
            self._flush()

    def _flush(self) -> None:
        self._table.write(self._rows)
        self._rows, self._size = [], 0

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._table.close()


SUFFIX = {"parquet": ".parquet", "webdataset": ".tar"}
WRITERS: dict[str, Callable[[Path, TableColumns], Writer]] = {
    "parquet": _Parquet,
    "webdataset": _Tar,
}
