"""A zip of images, never unpacked: EDM's and StyleGAN's, or any folder that somebody zipped."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from sfumato.data import files
from sfumato.data.file_types import HEAD_BYTES
from sfumato.data.files import UnsafePath
from sfumato.data.listing import (
    DAMAGED_ZIP,
    MAX_BYTES,
    Blob,
    Listing,
    Reject,
    Slice,
    Source,
    ZipMember,
    printable_name,
)
from sfumato.data.sources.image_folder import ImageFolderReader
from sfumato.data.sources.kohya import Folders
from sfumato.data.text_encoding import Texts
from sfumato.errors import DataError

MAX_MEMBERS = 5_000_000
MAX_DIRECTORY_BYTES = 1 << 30
MAX_RATIO = 200  # of a member above 1 MiB; images are compressed already


@dataclass(frozen=True)
class Zip(Source):
    """A .zip of images: with EDM's `dataset.json`, or laid out like a folder.

    Attributes:
        path, metadata, unnamed, folders: as of a folder.
    """

    is_of_files: ClassVar[bool] = True

    path: str
    metadata: Literal["auto", "off"] = "auto"
    unnamed: Literal["leave_out", "use"] = "leave_out"
    folders: Folders = "auto"

    def listing(self) -> Listing:
        """List the images of the archive, read like a folder.

        Raises:
            DataError: if the archive is missing, damaged or too large, or holds no images.
        """
        members, rejects, remarks = _members(self.path)
        return ImageFolderReader(
            where=self.path,
            names=sorted(members),
            blob=members.__getitem__,
            head=lambda name: members[name].read()[:HEAD_BYTES],
            metadata=self.metadata,
            unnamed=self.unnamed,
            folders=self.folders,
            rejects=rejects,
            remarks=remarks,
        ).listing()


def _members(path: str) -> tuple[dict[str, Blob], list[Reject], list[str]]:
    """Return the regular files by name, what was refused, and remarks on the archive."""
    try:
        file = files.local(path)
        if _directory_bytes(str(file)) > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile("its directory alone is over 1 GiB")
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except FileNotFoundError:
        raise DataError(
            "no such file",
            where=path,
            hint="check the path; it is relative to where you run sfumato",
        ) from None
    except (*DAMAGED_ZIP, OSError) as error:
        raise DataError(
            f"is not a complete zip: {error}", where=path, hint="download or recreate it"
        ) from None
    if len(infos) > MAX_MEMBERS:
        raise DataError(
            f"{len(infos)} members", where=path, hint=f"split it: at most {MAX_MEMBERS} are read"
        )
    names, remarks = _names(infos)
    members: dict[str, Blob] = {}
    rejects: list[Reject] = []
    stored: dict[str, zipfile.ZipInfo] = {}
    for info, name in zip(infos, names, strict=True):
        if info.is_dir() or name.endswith("/") or files.is_hidden(name.split("/")):
            continue
        try:
            _check(info, name)
            if name in members:
                raise UnsafePath("appears twice in the archive: the first one is used")
        except UnsafePath as reason:
            rejects.append(Reject(printable_name(name)[:200], str(reason)))
        else:
            members[name] = ZipMember(path, info.filename)
            stored[name] = info
    return members | _slices_of_stored(path, stored), rejects, remarks


def _names(infos: list[zipfile.ZipInfo]) -> tuple[list[str], list[str]]:
    """Return names in their most likely encoding and with `/` between folders, and remarks.

    Archives made on Windows may have other separators.
    """
    names = [info.filename.replace("\\", "/") for info in infos]
    # Without the flag for UTF-8, `zipfile` takes names for the code page of the first PCs.
    foreign = {
        str(i): name.encode("cp437")
        for i, (info, name) in enumerate(zip(infos, names, strict=True))
        if not info.flag_bits & 0x800 and not name.isascii()
    }
    if not foreign:
        return names, []
    texts = Texts()
    for number, raw in foreign.items():
        texts.add(number, raw)
    texts.settle()
    for number in foreign:
        names[int(number)] = texts[number]
    return names, [f"names: {texts.note}"] if texts.note else []


def _check(info: zipfile.ZipInfo, name: str) -> None:
    files.check_relative(name)
    kind = info.external_attr >> 28
    if kind not in (0, 8):  # Unix: none given, or a regular file
        raise UnsafePath("is a link or a device")
    if info.flag_bits & 1:
        raise UnsafePath("is encrypted")
    if info.file_size > MAX_BYTES:
        raise UnsafePath(f"more than {MAX_BYTES >> 20} MiB")
    if info.file_size > (1 << 20) and info.file_size > MAX_RATIO * max(1, info.compress_size):
        raise UnsafePath(f"unpacks to over {MAX_RATIO} times its size")


def _slices_of_stored(path: str, infos: Mapping[str, zipfile.ZipInfo]) -> dict[str, Blob]:
    """Return uncompressed members as slices of the file: no lock, checksum or open archive."""
    result: dict[str, Blob] = {}
    with files.local(path).open("rb") as file:
        for name, info in infos.items():
            if info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size:
                file.seek(max(0, info.header_offset))
                header = file.read(30)
                if len(header) == 30 and header[:4] == b"PK\x03\x04":
                    name_length, extra_length = struct.unpack("<HH", header[26:30])
                    result[name] = Slice(
                        path, info.header_offset + 30 + name_length + extra_length, info.file_size
                    )
    return result


def _directory_bytes(path: str) -> int:
    """Return the size of the central directory as the end of the archive states it.

    It is known before anything reads the directory; 0 if it is not stated.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 65_557))
        tail = file.read()
    place = tail.rfind(b"PK\x05\x06")
    stated = (
        struct.unpack("<L", tail[place + 12 : place + 16])[0]
        if place >= 0 and len(tail) >= place + 16
        else 0
    )
    return min(stated, size)
