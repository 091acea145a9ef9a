"""WebDataset: tar files whose members `key.jpg key.txt key.json ...` make up one sample; read in place, never unpacked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sfumato.data import files
from sfumato.data.decoding import SUFFIXES
from sfumato.data.entry import MAX_TEXT_BYTES, Entry, Listing, Reject, Slice, described, legible
from sfumato.data.files import UnsafePath
from sfumato.data.sources.folder import LAYERS, readable
from sfumato.errors import DataError

MAX_MEMBERS = 1_000_000  # of one shard
MAX_HEADER_BYTES = 1 << 20  # of one member's extended header


class Member(NamedTuple):
    """A regular file inside a tar."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class WebDataset:
    """A .tar shard, or a folder of them. A sample is a run of members with the same name up to the first dot."""

    path: str

    def listing(self) -> Listing:
        entries: list[Entry] = []
        rejects: list[Reject] = []
        for shard in self._shards():
            members, refused = indexed(shard)
            prefix = "" if shard == self.path else f"{legible(shard[len(self.path.rstrip('/')) + 1 :])}:"
            rejects += [Reject(prefix + reject.name, reject.reason) for reject in refused]
            _samples(shard, prefix, members, entries, rejects)
        if not entries:
            reasons = "; ".join(f"{reject.name}: {reject.reason}" for reject in rejects[:3])
            raise DataError(
                "holds no pictures" + (f" ({reasons})" if reasons else ""),
                where=self.path,
                mend=f"members end in {', '.join(SUFFIXES)}",
            )
        return Listing(entries, rejects)

    def _shards(self) -> list[str]:
        if not files.exists(self.path):
            raise DataError(
                "no such file or folder", where=self.path, mend="check the path; it is relative to where you run sfumato"
            )
        root = self.path.rstrip("/")
        found = [f"{root}/{name}" for name in files.walk(root)] if files.is_folder(self.path) else [self.path]
        packed = [name for name in found if name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"))]
        if packed:
            raise DataError(
                "is a compressed tar: no random access",
                where=packed[0],
                mend="unpack it to .tar; pictures are compressed already",
            )
        shards = [name for name in found if name.endswith(".tar")]
        if not shards:
            raise DataError("holds no .tar shards", where=self.path, mend="name a .tar file or the folder that holds them")
        return shards


def _samples(shard: str, prefix: str, members: list[Member], entries: list[Entry], rejects: list[Reject]) -> None:
    seen: set[str] = set()
    with files.local(shard).open("rb") as file:
        for key, group in groupby(members, key=lambda member: _key(member.name)):
            fields: dict[str, Member] = {}
            for member in group:
                field = member.name[len(key) + 1 :].lower()
                if field in fields:
                    rejects.append(Reject(prefix + legible(member.name), "stands twice in the tar; the first one counts"))
                fields.setdefault(field, member)
            image = next((field for field in fields if "." + field in SUFFIXES), None)
            name = prefix + legible(key)
            if image is None:
                rejects.append(Reject(name, f"no picture among {', '.join(legible(field) for field in list(fields)[:5])}"))
            elif key in seen:
                rejects.append(Reject(name, "its members do not stand together in the tar"))
            else:
                seen.add(key)
                found = _described(file, fields, name, rejects)
                for layer, suffixes in LAYERS.items():
                    place = next((fields[layer + suffix] for suffix in suffixes if layer + suffix in fields), None)
                    if place is not None:
                        found[layer] = Slice(shard, place.offset, place.size)
                entries.append(
                    Entry(name=f"{name}.{image}", image=Slice(shard, fields[image].offset, fields[image].size), **found)
                )


def _described(file: BinaryIO, fields: dict[str, Member], name: str, rejects: list[Reject]) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def text(field: str) -> str:
        member = fields[field]
        if member.size > MAX_TEXT_BYTES:
            raise ValueError(f".{field}: text of more than {MAX_TEXT_BYTES >> 10} KiB")
        file.seek(member.offset)
        return readable(file.read(member.size)).strip()

    for field in ("txt", "caption", "cls", "json"):
        if field not in fields:
            continue
        try:
            if field == "cls":
                found.update(described({"cls": text(field)}))
            elif field == "json":
                record = json.loads(text(field))
                if not isinstance(record, dict):
                    raise ValueError("not a JSON object")
                found.update(described(record))
            else:
                found.update(described({"caption": text(field)}))
        except (ValueError, RecursionError) as error:
            rejects.append(Reject(name, f".{field} left out: {str(error)[:100]}"))
    return found


def _key(name: str) -> str:
    """The path up to the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def indexed(shard: str) -> tuple[list[Member], list[Reject]]:
    """The regular members of a tar, from the cache if this very file was indexed before."""
    try:
        path = files.local(shard)
        state = path.stat()
        identity = f"{path.resolve()} {state.st_size} {state.st_mtime_ns} 1"
        kept = files.cache_folder() / "tar-index" / f"{hashlib.sha256(identity.encode()).hexdigest()}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not there, or damaged
            stored = json.loads(kept.read_text())
            return [Member(*member) for member in stored["members"]], [Reject(*reject) for reject in stored["rejects"]]
        members, rejects = _index(path)
    except (tarfile.TarError, OSError, ValueError, KeyError, RecursionError) as error:
        raise DataError(f"is no whole tar: {error}", where=shard, mend="fetch or make it again") from None
    _keep(kept, json.dumps({"members": members, "rejects": [[reject.name, reject.reason] for reject in rejects]}))
    return members, rejects


def _keep(target: Path, text: str) -> None:
    """Write into the cache if it can be written to; it saves time and nothing else."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent)
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(name, target)
    except OSError:
        return


class _Headers:
    """A tar file that refuses to read more at once than any header needs: sizes in it are claims."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def _index(path: Path) -> tuple[list[Member], list[Reject]]:
    members: list[Member] = []
    rejects: list[Reject] = []
    size = path.stat().st_size
    with path.open("rb") as file, tarfile.TarFile(fileobj=_Headers(file)) as tar:  # type: ignore[arg-type]
        for info in _headers(tar, path.name, rejects):
            plain = info.name.removeprefix("./")  # as `tar c .` writes them
            name = legible(plain)
            parts = plain.split("/")
            if info.isdir() or files.is_hidden(parts) or any(part.startswith("__") for part in parts):
                continue
            try:
                if not info.isreg() or info.issparse():
                    raise UnsafePath("is a link, a device or sparse")
                files.check_relative(plain)
                if info.size < 0 or info.offset_data + info.size > size:
                    raise UnsafePath("is cut short")
            except UnsafePath as reason:
                rejects.append(Reject(name[:200], str(reason)))
            else:
                members.append(Member(plain, info.offset_data, info.size))
        file.seek(min(max(0, tar.offset), size))
        if any(file.read(tarfile.BLOCKSIZE)):  # a whole tar ends in zeros
            rejects.append(Reject(legible(path.name), f"damaged after {len(members)} members: what follows cannot be read"))
    return members, rejects


def _headers(tar: tarfile.TarFile, name: str, rejects: list[Reject]) -> Iterator[tarfile.TarInfo]:
    for number in range(MAX_MEMBERS + 1):
        before = tar.offset
        try:
            info = tar.next()
            if info is not None and tar.offset <= before and number:
                raise tarfile.ReadError("a member of negative size")
        except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
            rejects.append(Reject(legible(name), f"damaged after {number} members: {error}"))
            return
        tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header
        if info is None:
            return
        yield info
    rejects.append(Reject(legible(name), f"more than {MAX_MEMBERS} members: the rest is not read"))
