"""Reading of TIFFs as scientists write them: any number of bands, integers of 8 to 64 bits, floats;
in strips or tiles, chunky or planar.

Files that Pillow reads value for value are left to it. Here only tags are parsed; compressed strips
are unpacked by Pillow's libtiff, which is given their bytes as an 8-bit image, so that nothing here
walks over compressed data.

Source: TIFF 6.0 (Adobe 1992), and Technical Note 3 (Adobe 2005) for the predictor of floating-point
values.
"""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfumato.data.pixel_format import (
    MAX_BANDS,
    UPRIGHT,
    RawImage,
    RejectedImage,
    check_size,
    transpose,
)

CLASSIC, BIG = (b"II*\0", b"MM\0*"), (b"II+\0", b"MM\0+")
MAX_PAGES = 100_000
MAX_UNPACKED_BYTES, GROUP_BYTES, MAX_STRIP_BYTES = 1 << 30, 64 << 20, 170_000_000
# of a tag's type
SIZES = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}
UNPACKED = {
    1: "none",
    5: "LZW",
    8: "deflate",
    32773: "PackBits",
    32946: "deflate",
    34925: "LZMA",
    50000: "Zstandard",
}
PILLOWS = {
    2: "CCITT",
    3: "CCITT fax 3",
    4: "CCITT fax 4",
    6: "old JPEG",
    7: "JPEG",
    34712: "JPEG 2000",
    50001: "WebP",
}
SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL, OFFSETS, ORIENTATION = (
    254,
    256,
    257,
    258,
    259,
    262,
    266,
    273,
    274,
)
BANDS, ROWS, COUNTS, PLANAR, PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILES, TILE_COUNTS = (
    277,
    278,
    279,
    284,
    317,
    322,
    323,
    324,
    325,
)
EXTRA, SAMPLES, ICC = 338, 339, 34675
READ = {
    SUBFILE,
    WIDTH,
    HEIGHT,
    BITS,
    COMPRESSION,
    PHOTOMETRIC,
    FILL,
    OFFSETS,
    ORIENTATION,
    BANDS,
    ROWS,
    COUNTS,
    PLANAR,
    PREDICTOR,
    TILE_WIDTH,
    TILE_HEIGHT,
    TILES,
    TILE_COUNTS,
    EXTRA,
    SAMPLES,
}
REDUCED, MASK = 1, 4  # of SUBFILE
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2
KINDS = {1: "u", 2: "i", 3: "f", 4: "u"}  # of SAMPLES


def is_tiff(data: bytes) -> bool:
    """Return whether the first bytes are those of a TIFF or BigTIFF."""
    return data[:4] in CLASSIC + BIG


@dataclass(frozen=True)
class Page:
    """One image of a file.

    Attributes:
        offset, end: of its directory in the file; at `end` is the place of the next one.
        order: "<" or ">".
        tags: the numbers of those tags that are read here.
    """

    offset: int
    end: int
    order: str
    tags: dict[int, tuple[int, ...]]

    def one(self, tag: int, default: int) -> int:
        """Return the first number of a tag, or `default` if the tag is absent or empty."""
        return (self.tags.get(tag) or (default,))[0]

    @property
    def width(self) -> int:
        """The width in pixels as stored, before the orientation is applied; 0 if missing."""
        return self.one(WIDTH, 0)

    @property
    def height(self) -> int:
        """The height in pixels as stored, before the orientation is applied; 0 if missing."""
        return self.one(HEIGHT, 0)

    @property
    def bands(self) -> int:
        """The number of values per pixel, alpha included."""
        return self.one(BANDS, 1)

    @property
    def bits(self) -> int:
        """The number of bits of each value; 0 where bands differ."""
        bits = self.tags.get(BITS) or (1,)
        return bits[0] if len(set(bits)) == 1 else 0

    @property
    def kind(self) -> str:
        """The kind of numbers: "u", "i" or "f", or "" for others and where bands differ."""
        kinds = {KINDS.get(code, "") for code in self.tags.get(SAMPLES) or (1,)}
        return kinds.pop() if len(kinds) == 1 else ""

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the values in this machine's byte order, for pages that can be read."""
        return np.dtype(f"{self.kind}{self.bits // 8}")

    @property
    def colours(self) -> int:
        """The number of bands that the photometric interpretation describes."""
        return 3 if self.one(PHOTOMETRIC, BLACK_IS_ZERO) == RGB else 1

    @property
    def alpha(self) -> bool:
        """Whether the last band is alpha, multiplied into the others or not."""
        return self.bands == self.colours + 1 and self.tags.get(EXTRA, ())[:1] in ((1,), (2,))

    @property
    def turned(self) -> bool:
        """Whether width and height are swapped when the image is turned upright."""
        return self.one(ORIENTATION, 1) in (5, 6, 7, 8)

    @property
    def is_frame(self) -> bool:
        """Whether it is a separate image rather than a thumbnail or mask of another one."""
        return not self.one(SUBFILE, 0) & (REDUCED | MASK)

    @property
    def exact_in_pillow(self) -> bool:
        """Whether Pillow returns all bands, value for value."""
        photometric = self.one(PHOTOMETRIC, BLACK_IS_ZERO)
        if self.kind != "u" or photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB):
            return self.kind == "u" and self.bits in (1, 2, 4, 8)  # palettes, CMYK, YCbCr, Lab
        if self.bands == self.colours:
            deep = self.bits in (12, 16) and photometric == BLACK_IS_ZERO
            return self.bits in (1, 2, 4, 8) or deep
        return self.alpha and self.bits == 8 and self.colours == 3

    def describe(self) -> str:
        """Describe the page for the reason why it is rejected."""
        number = {"u": "integers", "i": "signed integers", "f": "floats"}.get(
            self.kind, "values of an unknown kind"
        )
        code = self.one(COMPRESSION, 1)
        packed = {**UNPACKED, **PILLOWS}.get(code, f"number {code}")
        values = f"{self.bits}-bit {number}" if self.bits else f"{number} of different bit depths"
        return f"a TIFF of {self.bands} band(s) of {values}, compression {packed}"


def pages(data: bytes) -> Iterator[Page]:
    """Yield the pages of a file, one for each directory, in order.

    Raises:
        ValueError, struct.error: where directories are damaged.
    """
    order, big = "<" if data[:1] == b"I" else ">", data[:4] in BIG
    (offset,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, 8 if big else 4)
    visited: set[int] = set()
    while offset:
        if offset in visited or len(visited) >= MAX_PAGES:
            raise ValueError("circular directories, or too many")
        visited.add(offset)
        page, offset = _directory(data, offset, order, big)
        yield page


def _directory(data: bytes, offset: int, order: str, big: bool) -> tuple[Page, int]:
    entry, head, place = ("HHQ", "Q", 8) if big else ("HHI", "H", 4)
    (count,) = struct.unpack_from(order + head, data, offset)
    begin, size = offset + struct.calcsize(order + head), struct.calcsize(order + entry) + place
    if begin + count * size > len(data):
        raise ValueError("a directory is cut short")
    tags: dict[int, tuple[int, ...]] = {}
    for number in range(count):
        at = begin + number * size
        tag, kind, length = struct.unpack_from(order + entry, data, at)
        if tag not in READ or kind not in SIZES:
            continue
        form = f"{order}{length}{SIZES[kind]}" if length < len(data) else ""
        if not form or struct.calcsize(form) > len(data):
            raise ValueError(f"tag {tag} is longer than the file")
        value = at + size - place
        if struct.calcsize(form) > place:
            (value,) = struct.unpack_from(order + ("Q" if big else "I"), data, value)
        tags[tag] = struct.unpack_from(form, data, value)
    end = begin + count * size
    (following,) = struct.unpack_from(order + ("Q" if big else "I"), data, end)
    return Page(offset, end, order, tags), following


def first_page(data: bytes) -> Page | None:
    """Return the first page; None if its directory is damaged or there is none."""
    try:
        return next(pages(data), None)
    except (ValueError, struct.error, OverflowError):
        return None


def frames(data: bytes) -> list[Page]:
    """Return the pages except thumbnails and masks, as far as directories are intact.

    If there are only thumbnails and masks, the first page is returned.
    """
    all_pages: list[Page] = []
    with contextlib.suppress(ValueError, struct.error, OverflowError):
        all_pages.extend(pages(data))
    return [page for page in all_pages if page.is_frame] or all_pages[:1]


def single_page(data: bytes, page: Page) -> bytes:
    """Return the same file with `page` as its first and last image."""
    big = data[:4] in BIG
    form, place = page.order + ("Q" if big else "I"), 8 if big else 4
    out = bytearray(data)
    struct.pack_into(form, out, place, page.offset)
    struct.pack_into(form, out, page.end, 0)
    return bytes(out)


def read_page(data: bytes, page: Page) -> RawImage:
    """Read the values of a page, upright.

    Raises:
        RejectedImage: with a description of the page, if it cannot be read.
    """
    check_size(page.width, page.height)
    require_readable(page)
    array = _assemble(data, page)
    orientation = page.one(ORIENTATION, 1)
    if orientation in UPRIGHT:
        array = transpose(array, UPRIGHT[orientation])
    if page.one(PHOTOMETRIC, BLACK_IS_ZERO) == WHITE_IS_ZERO:
        array = np.concatenate(
            [_invert(array[..., : page.colours]), array[..., page.colours :]], axis=2
        )
    if page.alpha and page.tags[EXTRA][0] == 1:
        array = _unpremultiply(array)
    return RawImage(array, page.alpha)


def require_readable(page: Page) -> None:
    """Raise RejectedImage with a description of the page if it cannot be read."""
    photometric, predictor = page.one(PHOTOMETRIC, BLACK_IS_ZERO), page.one(PREDICTOR, 1)
    readable = page.bits in {"u": (8, 16, 32, 64), "i": (8, 16, 32, 64), "f": (16, 32, 64)}.get(
        page.kind, ()
    )
    supported = (
        photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB)
        and page.one(COMPRESSION, 1) in UNPACKED
        and page.one(FILL, 1) == 1
    )
    if (
        not readable
        or not supported
        or predictor not in (1, 2, 3)
        or not page.colours <= page.bands <= MAX_BANDS
    ):
        raise RejectedImage(
            f"{page.describe()}: not read; save it uncompressed with 8, 16 or 32 bits, or as "
            ".npy (H, W, C)"
        )
    if page.width * page.height * page.bands * page.bits // 8 > MAX_UNPACKED_BYTES:
        raise RejectedImage(
            f"{page.describe()}: unpacks to more than {MAX_UNPACKED_BYTES >> 30} GiB"
        )


def _invert(values: NDArray[Any]) -> NDArray[Any]:
    if values.dtype.kind == "f":
        return (1 - values).astype(values.dtype)
    result: NDArray[Any] = np.invert(values)
    return result


def _unpremultiply(values: NDArray[Any]) -> NDArray[Any]:
    """Divide colours by the alpha that was multiplied into them."""
    top = 1.0 if values.dtype.kind == "f" else float(np.iinfo(values.dtype).max)
    alpha = values[..., -1:].astype(np.float64)
    colours = np.where(alpha > 0, values[..., :-1] * (top / np.where(alpha > 0, alpha, 1)), 0).clip(
        0, top
    )
    colours = colours if values.dtype.kind == "f" else np.rint(colours)
    return np.concatenate([colours.astype(values.dtype), values[..., -1:]], axis=2)


def _assemble(data: bytes, page: Page) -> NDArray[Any]:
    """Assemble strips or tiles to (H, W, C) in this machine's byte order."""
    tiled = TILES in page.tags
    offsets = page.tags.get(TILES if tiled else OFFSETS, ())
    width = page.one(TILE_WIDTH, 0) if tiled else page.width
    rows = (
        page.one(TILE_HEIGHT, 0)
        if tiled
        else min(page.one(ROWS, page.height) or page.height, page.height)
    )
    if min(width, rows) < 1 or max(width, rows) > 1 << 20:
        raise RejectedImage(f"damaged: tiles of {width} x {rows}")
    across, down = -(-page.width // width), -(-page.height // rows)
    planes = page.bands if page.one(PLANAR, 1) == 2 else 1
    bands = 1 if planes > 1 else page.bands
    each = across * down
    if (
        len(offsets) < each * planes
        or across * down * width * rows * page.bands * page.bits // 8 > 2 * MAX_UNPACKED_BYTES
    ):
        raise RejectedImage(
            f"damaged: {len(offsets)} strips or tiles, where there should be {each * planes}"
        )
    counts = page.tags.get(TILE_COUNTS if tiled else COUNTS, ())
    counts = (
        counts if len(counts) >= len(offsets) else tuple(len(data) - offset for offset in offsets)
    )
    height = down * rows if tiled else page.height
    result = []
    for plane in range(planes):
        part = slice(plane * each, (plane + 1) * each)
        total = each * rows if tiled else height
        raw = _unpack(
            data, page, offsets[part], counts[part], rows, total, width * bands * page.bits // 8
        )
        values = _undo_predictor(raw, page, width, bands)
        if tiled:
            values = (
                values.reshape(down, across, rows, width, bands)
                .swapaxes(1, 2)
                .reshape(height, across * width, bands)
            )
        result.append(values[: page.height, : page.width])
    return result[0] if planes == 1 else np.concatenate(result, axis=2)


def _unpack(
    data: bytes,
    page: Page,
    offsets: Sequence[int],
    counts: Sequence[int],
    rows: int,
    total: int,
    stride: int,
) -> NDArray[np.uint8]:
    """Unpack strips of `rows` rows each to the bytes (total, stride)."""
    out = np.empty((total, stride), np.uint8)
    compression = page.one(COMPRESSION, 1)
    group = max(1, GROUP_BYTES // max(1, rows * stride)) if compression != 1 else 1
    for first in range(0, len(offsets), group):
        top, bottom = first * rows, min(total, (first + group) * rows)
        if top >= bottom:
            break
        strips = [
            data[at : at + size]
            for at, size in zip(
                offsets[first : first + group], counts[first : first + group], strict=True
            )
        ]
        if compression == 1:
            strip = np.frombuffer(strips[0][: (bottom - top) * stride], np.uint8)
            if strip.size < (bottom - top) * stride:
                raise RejectedImage("damaged: the image is cut short")
            out[top:bottom] = strip.reshape(-1, stride)
        else:
            out[top:bottom] = _unpack_with_libtiff(strips, compression, rows, bottom - top, stride)
    return out


def _unpack_with_libtiff(
    strips: Sequence[bytes], compression: int, rows: int, total: int, stride: int
) -> NDArray[np.uint8]:
    """Unpack strips as those of an 8-bit image of `total` rows of `stride` bytes."""
    if total * stride > MAX_STRIP_BYTES:
        raise RejectedImage(
            f"a strip or tile of more than {MAX_STRIP_BYTES // 1_000_000} million bytes"
        )
    body = b"".join(strips)
    places, lengths, at = [], [], 8
    for strip in strips:
        places.append(at)
        lengths.append(len(strip))
        at += len(strip)
    count = len(strips)
    lists = struct.pack(f"<{2 * count}I", *places, *lengths)
    after = at + len(lists)
    entries = [
        (WIDTH, 4, 1, stride),
        (HEIGHT, 4, 1, total),
        (BITS, 3, 1, 8),
        (COMPRESSION, 3, 1, compression),
        (PHOTOMETRIC, 3, 1, 1),
        (OFFSETS, 4, count, at if count > 1 else places[0]),
        (BANDS, 3, 1, 1),
        (ROWS, 4, 1, rows),
        (COUNTS, 4, count, at + 4 * count if count > 1 else lengths[0]),
    ]
    table = (
        struct.pack("<H", len(entries))
        + b"".join(struct.pack("<HHII", *entry) for entry in entries)
        + b"\0\0\0\0"
    )
    with Image.open(
        io.BytesIO(b"II*\0" + struct.pack("<I", after) + body + lists + table), formats=("TIFF",)
    ) as image:
        return np.asarray(image)


def _undo_predictor(raw: NDArray[np.uint8], page: Page, width: int, bands: int) -> NDArray[Any]:
    """Undo the predictor, and return (rows, width, bands) in this machine's byte order."""
    predictor, rows, itemsize = page.one(PREDICTOR, 1), len(raw), page.bits // 8
    if predictor == 3 and page.one(COMPRESSION, 1) != 1:
        if page.kind != "f":
            raise RejectedImage("damaged: a predictor for floating-point values, and integers")
        summed = np.cumsum(raw.reshape(rows, -1, bands), axis=1, dtype=np.uint8)
        ordered = np.ascontiguousarray(summed.reshape(rows, itemsize, width * bands).swapaxes(1, 2))
        return (
            ordered.view(np.dtype(f">f{itemsize}")).reshape(rows, width, bands).astype(page.dtype)
        )
    stored = np.dtype(f"{page.order}{page.kind}{itemsize}")
    values = raw.view(stored).reshape(rows, width, bands).astype(page.dtype, copy=False)
    if predictor == 2 and page.one(COMPRESSION, 1) != 1:
        unsigned = np.dtype(f"u{itemsize}")
        values = np.cumsum(values.view(unsigned), axis=1, dtype=unsigned).view(page.dtype)
    return values
