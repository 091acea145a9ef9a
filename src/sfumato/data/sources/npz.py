"""Arrays of pixels in an .npz."""

from __future__ import annotations

import hashlib
import io
import math
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sfumato.data import files
from sfumato.data.listing import DAMAGED_ZIP, Entry, Listing, Reject, Source, printable_name, read
from sfumato.data.pixel_format import is_numeric
from sfumato.data.split_names import TRAIN, split_of
from sfumato.errors import DataError
from sfumato.storage.atomic import atomic_file
from sfumato.storage.cache_folder import cache_folder

IMAGES, LABELS = (
    ("images", "image", "x", "samples", "imgs", "data", "arr_0"),
    ("labels", "label", "y", "targets", "target", "arr_1"),
)
MAX_UNPACKED_BYTES, MAX_LABEL_BYTES, MAX_RATIO, MAX_IMAGES = 64 << 30, 1 << 30, 200, 5_000_000


@dataclass(frozen=True, slots=True)
class ArrayImage:
    """One image of an array on disk, as the bytes of a .npy."""

    path: str
    offset: int
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> bytes:
        """Read the image's values, and return them as the bytes of a .npy.

        Raises:
            OSError: if the file is gone or truncated.
        """
        dtype = np.dtype(self.dtype)
        size = math.prod(self.shape) * dtype.itemsize
        data = read(self.path, self.offset, size)
        if len(data) < size:
            raise OSError(f"{self.path} is cut short")
        buffer = io.BytesIO()
        np.save(buffer, np.frombuffer(data, dtype).reshape(self.shape), allow_pickle=False)
        return buffer.getvalue()


class SplitArrays(NamedTuple):
    """A pair of arrays of an .npz: its hold-out, None for the images that are trained on, and the
    names of the arrays of images and labels.
    """

    holdout: str | None
    images: str
    labels: str | None


@dataclass(frozen=True)
class Npz(Source):
    """An .npz with pixels (N, H, W, C) or (N, H, W) of numbers as `images` or `arr_0`, and perhaps
    `labels` or `arr_1`.

    Splits are found by name: `train_images` and `train_labels` as MedMNIST has them, `x_train` and
    `y_train` as Keras; those of `test` and
    `val` are held out.

    Attributes:
        path: file or URL.
    """

    is_of_files: ClassVar[bool] = True

    path: str

    def listing(self) -> Listing:
        """List the images of all splits; a compressed array is first unpacked into the cache.

        Raises:
            DataError: if the file is missing or damaged, or holds no array of images.
        """
        try:
            with zipfile.ZipFile(files.local(self.path)) as archive:
                infos = {
                    info.filename.removesuffix(".npy"): info
                    for info in archive.infolist()
                    if info.filename.endswith(".npy")
                }
                parts = _parts(list(infos))
                if not parts:
                    raise DataError(
                        f"holds {', '.join(list(infos)[:5]) or 'no arrays'}",
                        where=self.path,
                        hint="name the pixels `images` or `arr_0`, or `train_images` and "
                        "`test_images`",
                    )
                entries = [
                    entry
                    for part in parts
                    for entry in self._entries(archive, infos, part, len(parts))
                ]
        except FileNotFoundError:
            raise DataError(
                "no such file",
                where=self.path,
                hint="check the path; it is relative to where you run sfumato",
            ) from None
        except (*DAMAGED_ZIP, OSError) as error:
            raise DataError(
                f"is not a complete .npz of plain numbers: {str(error)[:200]}",
                where=self.path,
                hint="save it with np.savez",
            ) from None
        used = {name for part in parts for name in (part.images, part.labels)}
        rejects = [
            Reject(printable_name(name), "an array that is neither images nor labels", part=True)
            for name in infos
            if name not in used
        ]
        held = [f"{part.images} as {part.holdout}" for part in parts if part.holdout is not None]
        remarks = (f"held out by name: {', '.join(held)}",) if held else ()
        return Listing(entries=entries, rejects=rejects, unit="images", remarks=remarks)

    def _entries(
        self,
        archive: zipfile.ZipFile,
        infos: dict[str, zipfile.ZipInfo],
        part: SplitArrays,
        parts: int,
    ) -> list[Entry]:
        """List the images of one part."""
        place, start = _plain(self.path, archive, infos[part.images])
        shape, dtype, offset = _header(files.local(place), start)
        categories = None if part.labels is None else _categories(archive, infos[part.labels])
        if (
            len(shape) not in (3, 4)
            or not is_numeric(dtype)
            or min(shape) < 1
            or shape[0] > MAX_IMAGES
        ):
            raise DataError(
                f"pixels of shape {shape} and type {dtype}",
                where=self.path,
                hint="use (N, H, W, C) of integers or floating-point numbers, N at most "
                f"{MAX_IMAGES}",
            )
        if categories is not None and len(categories) != shape[0]:
            raise DataError(
                f"{len(categories)} labels for {shape[0]} images",
                where=self.path,
                hint="give each image one label",
            )
        size = math.prod(shape[1:]) * dtype.itemsize
        if offset + shape[0] * size > files.local(place).stat().st_size:
            raise DataError("is cut short", where=self.path, hint="download or recreate it")
        width, prefix = (
            len(str(shape[0] - 1)),
            f"{printable_name(part.images)}/" if parts > 1 else "",
        )
        return [
            Entry(
                name=f"{prefix}{i:0{width}d}",
                image=ArrayImage(place, offset + i * size, shape[1:], dtype.str),
                category=None if categories is None else categories[i],
                holdout=part.holdout,
            )
            for i in range(shape[0])
        ]


def _parts(names: Sequence[str]) -> list[SplitArrays]:
    """Find which arrays are images, which are their labels, and which are held out."""
    splits: dict[str | None, tuple[str, str | None]] = {}
    for split in sorted({split for name in names if (split := _split(name)[0]) is not None}):
        arrays = {_split(name)[1]: name for name in names if _split(name)[0] == split}
        image, label = (
            next((arrays[key] for key in keys if key in arrays), None) for keys in (IMAGES, LABELS)
        )
        if image is not None:
            splits[split] = (image, label)
    trained = [split for split in splits if split_of(str(split)) == TRAIN]
    if trained:
        return [
            SplitArrays(None if split in trained else split, *pair)
            for split, pair in sorted(splits.items(), key=lambda item: item[0] not in trained)
        ]
    image, label = (
        next((name for name in keys if name in names), None) for keys in (IMAGES, LABELS)
    )
    return [] if image is None else [SplitArrays(None, image, label)]


def _split(name: str) -> tuple[str | None, str]:
    """Return the split and the rest of a name: `train` and `images` of `train_images`.

    Likewise `test` and `x` of `x_test`; None and the name itself if it belongs to no split.
    """
    first, _, remainder = name.lower().partition("_")
    start, _, last = name.lower().rpartition("_")
    if remainder and split_of(first) is not None:
        return first, remainder
    return (last, start) if start and split_of(last) is not None else (None, name)


def _plain(path: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[str, int]:
    """Return the file that holds a member uncompressed, and the offset of the member in it.

    The file is the .npz itself, or a copy in the cache.
    """
    file = files.local(path)
    if info.compress_type == zipfile.ZIP_STORED:
        with file.open("rb") as stream:
            stream.seek(info.header_offset)
            header = stream.read(30)
        if header[:4] != b"PK\x03\x04":
            raise ValueError("a member's header is damaged")
        return path, info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    _check_size(info, MAX_UNPACKED_BYTES)
    identity = f"{file.resolve()} {files.version_of_local(path)} {info.filename}"
    target = cache_folder() / "arrays" / f"{hashlib.sha256(identity.encode()).hexdigest()}.npy"
    if not target.is_file():
        with atomic_file(target) as out, archive.open(info) as member:
            while block := member.read(1 << 20):
                out.write(block)
    return str(target), 0


def _header(path: Path, start: int) -> tuple[tuple[int, ...], np.dtype, int]:
    with path.open("rb") as file:
        file.seek(start)
        shape, dtype = _read_header(file)
        return shape, dtype, file.tell()


def _read_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"an array of format {version}")
    try:
        shape, fortran, dtype = read(file)
    except (
        Exception
    ) as error:  # whatever Python's own parser does on a header that is nested, long or cut
        raise ValueError(str(error)[:200] or type(error).__name__) from None
    if fortran or dtype.hasobject:
        raise ValueError(
            "an array of Python objects" if dtype.hasobject else "an array in Fortran order"
        )
    return shape, dtype


def _check_size(info: zipfile.ZipInfo, limit: int) -> None:
    if info.file_size > limit or info.file_size > max(1 << 20, MAX_RATIO * info.compress_size):
        raise ValueError(
            f"{info.filename} unpacks to {info.file_size} bytes, more than {limit} or "
            f"{MAX_RATIO} times its size"
        )


def plain_array(data: bytes) -> NDArray[Any]:
    """Read the array of an .npy, without copying its values.

    Raises:
        ValueError: if it is damaged, or holds anything but plain numbers and texts.
    """
    stream = io.BytesIO(data)
    shape, dtype = _read_header(stream)
    try:
        return np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape)
    except OverflowError as error:
        raise ValueError(str(error)) from None


def _categories(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> list[str]:
    _check_size(info, MAX_LABEL_BYTES)
    with archive.open(info) as file:
        labels = plain_array(file.read())
    if labels.ndim == 2 and labels.shape[1] > 1 and labels.dtype.kind in "biuf":
        labels = labels.argmax(1)  # one-hot
    try:
        return [_text(label) for label in labels.reshape(-1).tolist()]
    except SystemError:  # numpy's, of letters beyond Unicode
        raise ValueError("labels that are not text") from None


def _text(label: object) -> str:
    return printable_name(
        label.decode(errors="backslashreplace") if isinstance(label, bytes) else str(label)
    )
