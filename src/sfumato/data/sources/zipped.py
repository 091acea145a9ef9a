"""A zip of pictures, never unpacked: EDM's and StyleGAN's, or any folder that somebody zipped."""

from __future__ import annotations

import os
import struct
import zipfile
from dataclasses import dataclass

from sfumato.data import files
from sfumato.data.entry import DAMAGED_ZIP, MAX_BYTES, Blob, Listing, Reject, Slice, ZipMember, legible
from sfumato.data.files import UnsafePath
from sfumato.data.sources.folder import Tree
from sfumato.errors import DataError

MAX_MEMBERS = 5_000_000
MAX_DIRECTORY_BYTES = 1 << 30
MAX_RATIO = 200  # of a member above 1 MiB; pictures are compressed already


@dataclass(frozen=True)
class Zip:
    """A .zip of pictures: with EDM's `dataset.json`, or laid out like a folder."""

    path: str

    def listing(self) -> Listing:
        members, rejects = _members(self.path)
        tree = Tree(self.path, sorted(members), members.__getitem__)
        found = tree.listing()
        return Listing(found.entries, [*rejects, *found.rejects])


def _members(path: str) -> tuple[dict[str, Blob], list[Reject]]:
    """Regular files by name, and what was refused."""
    try:
        file = files.local(path)
        if _directory_bytes(str(file)) > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile("its directory alone is over 1 GiB")
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except FileNotFoundError:
        raise DataError("no such file", where=path, mend="check the path; it is relative to where you run sfumato") from None
    except (*DAMAGED_ZIP, OSError) as error:
        raise DataError(f"is no whole zip: {error}", where=path, mend="fetch or make it again") from None
    if len(infos) > MAX_MEMBERS:
        raise DataError(f"{len(infos)} members", where=path, mend=f"split it: at most {MAX_MEMBERS} are read")
    members: dict[str, Blob] = {}
    rejects: list[Reject] = []
    for info in infos:
        name = info.filename
        if info.is_dir() or files.is_hidden(name.split("/")):
            continue
        try:
            _check(info)
            if name in members:
                raise UnsafePath("stands twice in the archive")
        except UnsafePath as reason:
            rejects.append(Reject(legible(name)[:200], str(reason)))
        else:
            members[name] = ZipMember(path, name)
    return _stored(path, infos, members), rejects


def _check(info: zipfile.ZipInfo) -> None:
    files.check_relative(info.filename)
    kind = info.external_attr >> 28
    if kind not in (0, 8):  # Unix: none given, or a regular file
        raise UnsafePath("is a link or a device")
    if info.flag_bits & 1:
        raise UnsafePath("is encrypted")
    if info.file_size > MAX_BYTES:
        raise UnsafePath(f"more than {MAX_BYTES >> 20} MiB")
    if info.file_size > (1 << 20) and info.file_size > MAX_RATIO * max(1, info.compress_size):
        raise UnsafePath(f"unpacks to over {MAX_RATIO} times its size")


def _stored(path: str, infos: list[zipfile.ZipInfo], members: dict[str, Blob]) -> dict[str, Blob]:
    """Uncompressed members as plain slices of the file: no lock, no checksum, no open archive."""
    result = dict(members)
    with files.local(path).open("rb") as file:
        for info in infos:
            if info.filename in result and info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size:
                file.seek(max(0, info.header_offset))
                header = file.read(30)
                if len(header) == 30 and header[:4] == b"PK\x03\x04":
                    name_length, extra_length = struct.unpack("<HH", header[26:30])
                    result[info.filename] = Slice(path, info.header_offset + 30 + name_length + extra_length, info.file_size)
    return result


def _directory_bytes(path: str) -> int:
    """Size of the central directory as the archive's end states it, before anything reads it; 0 if it does not."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 65_557))
        tail = file.read()
    place = tail.rfind(b"PK\x05\x06")
    stated = struct.unpack("<L", tail[place + 12 : place + 16])[0] if place >= 0 and len(tail) >= place + 16 else 0
    return min(stated, size)
