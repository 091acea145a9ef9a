"""Files of several images: stacks, multi-page TIFFs, animations and four-dimensional arrays."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image

from sfumato.data import gif, tiff
from sfumato.data.decoding import RejectedImage, quiet, read_raw
from sfumato.data.file_types import NUMPY
from sfumato.data.listing import MAX_BYTES, Blob, Entry, Listing, Reject
from sfumato.data.npy import ArrayHeader
from sfumato.data.parallel import ordered_map
from sfumato.data.pixel_format import RawImage, check_size

Frames = Literal["first", "all", "max"]
MAX_FRAMES = 10_000  # of one file
ANIMATED = ("GIF", "WEBP", "PNG")


@dataclass(frozen=True, slots=True)
class Frame:
    """One image of a file, extracted as a separate file: a TIFF or array as it is stored, or an
    animation's frame as PNG.
    """

    file: Blob
    number: int

    def read(self) -> bytes:
        """Read the file, and return the bytes of image `number`.

        Raises:
            OSError: if the file is gone or damaged.
        """
        with _refused():
            return _ImageStack.of(self.file.read()).frame(self.number)
        raise AssertionError


@dataclass(frozen=True, slots=True)
class Brightest:
    """The largest value of each pixel over the first MAX_FRAMES images of a file; a file of one
    image stays as it is.
    """

    file: Blob

    def read(self) -> bytes:
        """Return the maximum as .npy, or as PNG if it has 8 bits and alpha.

        Raises:
            OSError: if the file is gone or damaged, or its frames have no maximum.
        """
        data = self.file.read()
        with _refused():
            stack = _ImageStack.of(data)
            return data if stack.count < 2 else _maximum(stack)
        raise AssertionError


class _refused:
    """A context that turns whatever is wrong with a file into an OSError, as `Blob.read` raises."""

    def __enter__(self) -> None:
        """Enter the context."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, OSError | MemoryError):
            raise OSError(str(error)[:200] or type(error).__name__) from None


@dataclass(frozen=True)
class _ImageStack:
    """The number of images in a file, and a function that returns the bytes of each."""

    count: int
    frame: Callable[[int], bytes]

    @classmethod
    def of(cls, data: bytes) -> _ImageStack:
        if len(data) > MAX_BYTES:
            return cls(1, lambda number: data)
        if tiff.is_tiff(data):
            pages = tiff.frames(data)
            return cls(len(pages), lambda number: tiff.single_page(data, pages[number]))
        if data.startswith(NUMPY):
            return cls._of_array(data)
        if data[:3] == b"GIF":
            return cls(gif.frames(data), lambda number: _frame_as_png(data, number))
        if data[8:12] == b"WEBP" or data.startswith(b"\x89PNG"):
            with quiet(), Image.open(io.BytesIO(data), formats=ANIMATED) as image:
                return cls(
                    int(getattr(image, "n_frames", 1)), lambda number: _frame_as_png(data, number)
                )
        return cls(1, lambda number: data)

    @classmethod
    def _of_array(cls, data: bytes) -> _ImageStack:
        header = ArrayHeader.of(data)
        if len(header.shape) != 4 or header.fortran or header.dtype.hasobject:
            return cls(1, lambda number: data)
        size = int(np.prod(header.shape[1:])) * header.dtype.itemsize

        def frame(number: int) -> bytes:
            part = data[header.offset + number * size : header.offset + (number + 1) * size]
            buffer = io.BytesIO()
            np.save(
                buffer,
                np.frombuffer(part, header.dtype).reshape(header.shape[1:]),
                allow_pickle=False,
            )
            return buffer.getvalue()

        return cls(header.shape[0], frame)


def _frame_as_png(data: bytes, number: int) -> bytes:
    """Return a frame of an animation, composited over those before it, as PNG."""
    with quiet(), Image.open(io.BytesIO(data), formats=ANIMATED) as image:
        check_size(*image.size)
        image.seek(number)
        buffer = io.BytesIO()
        image.convert("RGBA" if image.has_transparency_data else "RGB").save(
            buffer, "PNG", compress_level=1
        )
    return buffer.getvalue()


def _maximum(stack: _ImageStack) -> bytes:
    best: RawImage | None = None
    for number in range(min(stack.count, MAX_FRAMES)):
        raw = read_raw(stack.frame(number))
        if best is not None and raw.array.shape != best.array.shape:
            raise RejectedImage(
                "its frames differ in shape, so they have no maximum: data.frames=first or all"
            )
        best = raw if best is None else best._replace(array=np.maximum(best.array, raw.array))
    assert best is not None
    buffer = io.BytesIO()
    if not best.alpha:
        np.save(buffer, best.array, allow_pickle=False)
    elif best.array.dtype == np.uint8:
        Image.fromarray(best.array).save(buffer, "PNG", compress_level=1)
    else:
        raise RejectedImage(
            "frames of 16 bits with alpha have no maximum: data.frames=first or all"
        )
    return buffer.getvalue()


def expand_frames(listing: Listing, frames: Frames) -> Listing:
    """Return a listing of frames (`all`) or of the maximum of each file (`max`).

    For `first`, the listing is unchanged. Frames are called `file#0003`, keep what is known of the
    file, and form a group, which is never split over training and hold-out. Frames beyond
    MAX_FRAMES of a file are rejected.
    """
    if frames == "first":
        return listing
    if frames == "max":
        return replace(
            listing,
            entries=[replace(entry, image=Brightest(entry.image)) for entry in listing.entries],
        )
    entries: list[Entry] = []
    rejects = list(listing.rejects)
    for entry, count in zip(listing.entries, ordered_map(_count, listing.entries), strict=True):
        entries += _split(entry, min(count, MAX_FRAMES))
        if count > MAX_FRAMES:
            rejects.append(
                Reject(
                    entry.name,
                    f"{count - MAX_FRAMES} frames beyond the first {MAX_FRAMES} left out",
                )
            )
    more = len(entries) + len(rejects) - len(listing.entries) - len(listing.rejects)
    return replace(
        listing,
        entries=entries,
        rejects=rejects,
        total=listing.total + more,
        unit=f"{listing.unit} and frames",
    )


def _count(entry: Entry) -> int:
    try:
        with _refused():
            return _ImageStack.of(entry.image.read()).count
    except OSError:  # said when it is decoded
        pass
    return 1


def _split(entry: Entry, count: int) -> Sequence[Entry]:
    if count < 2:
        return [entry]
    return [
        replace(
            entry,
            name=f"{entry.name}#{number:04d}",
            image=Frame(entry.image, number),
            group=entry.group or entry.name,
        )
        for number in range(count)
    ]


def unused_frames(counts: Sequence[int]) -> list[str]:
    """Return a remark on files of which only the first image is used; [] if there are none.

    Args:
        counts: the number of images in each file.
    """
    stacks = [count for count in counts if count > 1]
    if not stacks:
        return []
    return [
        f"{sum(stacks) - len(stacks):,} frames left out: {len(stacks)} files hold several and "
        "the first is used; "
        "data.frames=all takes all, max their maximum"
    ]
