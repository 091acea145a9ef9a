"""Reading of PNGs of 16-bit colour, which Pillow reads as 8-bit.

A row's filters work on each byte of a pixel by itself, so a 16-bit image consists of one 8-bit gray
image for each byte of a pixel, all with the same filters. Pillow unfilters these.

Source: Portable Network Graphics (W3C 2003), sections 7 to 9.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from sfumato.data.pixel_format import RawImage, RejectedImage, check_size

PNG = b"\x89PNG\r\n\x1a\n"
BANDS = {2: 3, 4: 2, 6: 4}  # by colour type; gray of 16 bits Pillow reads as it is
LEFT_TO_PILLOW = {b"tRNS", b"iCCP", b"acTL"}  # one clear colour, other colours, several frames


def is_deep_colour(data: bytes) -> bool:
    """Return whether bytes are a plain PNG of 16-bit colour, or of 16-bit gray with alpha."""
    head = data[:33]
    is_complete = len(head) == 33 and head.startswith(PNG) and head[12:16] == b"IHDR"
    if not is_complete or head[24] != 16 or head[25] not in BANDS or head[28] != 0:
        return False
    kinds = {kind for kind, _ in _chunks(data, bodies=False)}
    return not kinds & LEFT_TO_PILLOW


def read_deep_colour(data: bytes) -> RawImage:
    """Read the values of a PNG that `is_deep_colour` accepts.

    Raises:
        RejectedImage: if it is damaged.
    """
    width, height = struct.unpack(">II", data[16:24])
    check_size(width, height)
    bands = BANDS[data[25]]
    stride = 1 + 2 * bands * width
    rows = _inflate(data, height * stride)
    filters, filtered = rows[:, 0], rows[:, 1:].reshape(height, width, 2 * bands)
    planes = [_unfilter(filters, filtered[..., number]) for number in range(2 * bands)]
    pixels = np.stack(planes, axis=2).view(">u2").astype(np.uint16)
    return RawImage(pixels, alpha=bands in (2, 4))


def _chunks(data: bytes, *, bodies: bool = True) -> Iterator[tuple[bytes, bytes]]:
    """Yield the kind and body of each chunk, up to the end of the image.

    Checksums are verified if `bodies` is true.
    """
    place = 8
    while place + 12 <= len(data):
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        body = data[place + 8 : place + 8 + size] if bodies else b""
        if bodies and (
            len(body) < size
            or zlib.crc32(kind + body)
            != int.from_bytes(data[place + 8 + size : place + 12 + size], "big")
        ):
            raise RejectedImage("damaged: a chunk of the PNG is cut short or has another checksum")
        yield kind, body
        if kind == b"IEND":
            return
        place += 12 + size
    if bodies:
        raise RejectedImage("damaged: the PNG is cut short")


def _inflate(data: bytes, size: int) -> np.ndarray:
    """Unpack the rows (H, 1 + bytes of a row), and never more than `size` bytes."""
    stream = zlib.decompressobj()
    out = stream.decompress(b"".join(body for kind, body in _chunks(data) if kind == b"IDAT"), size)
    if len(out) < size:
        raise RejectedImage("damaged: the PNG's pixels are cut short")
    height = struct.unpack(">I", data[20:24])[0]
    return np.frombuffer(out, np.uint8).reshape(height, -1)


def _unfilter(filters: np.ndarray, plane: np.ndarray) -> np.ndarray:
    """Undo the filters of a plane that holds one byte of each pixel, (H, W)."""
    height, width = plane.shape
    packed = zlib.compress(np.concatenate([filters[:, None], plane], axis=1).tobytes(), 0)
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", packed), (b"IEND", b"")]
    png = PNG + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        return np.asarray(image)
