"""Encoders of 16-bit PNG and of TIFF with any number of channels, which Pillow does not write."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

DESCRIPTION = 270  # TIFF's ImageDescription, in EXIF too
SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # of PNG, by channels
UP = 2  # filter type: the difference to the row above, modulo 256


def png16(pixels: NDArray[np.uint16], text: dict[str, str]) -> bytes:
    """Encode pixels (H, W, C), C from 1 to 4, as a PNG of 16 bits per value; `text` goes into tEXt.

    Pillow writes 16 bits for gray only.

    Source: PNG specification, third edition, secs. 5, 9 and 11.
    """
    height, width, channels = pixels.shape
    rows = np.ascontiguousarray(pixels.astype(">u2")).view(np.uint8).reshape(height, -1)
    lines = np.full((height, rows.shape[1] + 1), UP, np.uint8)
    lines[:, 1:] = np.diff(rows, axis=0, prepend=np.zeros_like(rows[:1]))
    head = struct.pack(">IIBBBBB", width, height, 16, COLOUR_TYPES[channels], 0, 0, 0)
    parts = [
        (b"IHDR", head),
        *((b"tEXt", f"{key}\0{value}".encode("latin-1")) for key, value in text.items()),
    ]
    parts += [(b"IDAT", zlib.compress(lines.tobytes(), 6)), (b"IEND", b"")]
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    return SIGNATURE + b"".join(chunks)


def png16_pixels(data: bytes) -> NDArray[np.uint16]:
    """Decode the pixels (H, W, C) of a PNG that `png16` wrote."""
    place, packed = len(SIGNATURE), b""
    width, height, _, colour = struct.unpack_from(">IIBB", data, place + 8)
    while place < len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        packed += data[place + 8 : place + 8 + length] if kind == b"IDAT" else b""
        place += 12 + length
    lines = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, -1)
    rows = np.cumsum(lines[:, 1:], axis=0, dtype=np.uint8)
    channels = next(count for count, number in COLOUR_TYPES.items() if number == colour)
    return rows.view(">u2").astype(np.uint16).reshape(height, width, channels)


def tiff(pixels: NDArray[Any], description: str, *, alpha: bool) -> bytes:
    """Encode pixels (H, W, C) of uint8, uint16 or float32 as an uncompressed TIFF.

    The pixels begin at byte 8.

    Source: TIFF 6.0 (Adobe 1992), secs. 2, 8 and 18.
    """
    height, width, channels = pixels.shape
    data = np.ascontiguousarray(pixels.astype(pixels.dtype.newbyteorder("<"))).tobytes()
    rgb = channels - alpha == 3
    extra = [0] * (channels - (3 if rgb else 1) - alpha) + [2] * alpha
    short, long = "H", "I"
    entries: list[tuple[int, str, list[int] | bytes]] = [
        (256, long, [width]),
        (257, long, [height]),
        (258, short, [8 * pixels.dtype.itemsize] * channels),
        (259, short, [1]),
        (262, short, [2 if rgb else 1]),
        (DESCRIPTION, "s", description.encode("ascii") + b"\0"),
        (273, long, [8]),
        (277, short, [channels]),
        (278, long, [height]),
        (279, long, [len(data)]),
        (284, short, [1]),
        *([(338, short, extra)] if extra else []),
        (339, short, [3 if pixels.dtype.kind == "f" else 1] * channels),
    ]
    data += b"\0" * (len(data) % 2)
    fields = b""
    for tag, kind, value in entries:
        packed = value if isinstance(value, bytes) else struct.pack(f"<{len(value)}{kind}", *value)
        if len(packed) > 4:
            place, data = (
                struct.pack("<I", 8 + len(data)),
                data + packed + b"\0" * (len(packed) % 2),
            )
        else:
            place = packed.ljust(4, b"\0")
        fields += struct.pack("<HHI", tag, {"s": 2, "H": 3, "I": 4}[kind], len(value)) + place
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    return head + data + struct.pack("<H", len(entries)) + fields + b"\0\0\0\0"


def tiff_tags(data: bytes) -> dict[int, Any]:
    """Read the texts and single numbers of the first directory of a TIFF that `tiff` wrote."""
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    tags: dict[int, Any] = {}
    for number in range(count):
        tag, kind, length, place = struct.unpack_from("<HHII", data, start + 2 + 12 * number)
        if kind == 2:
            tags[tag] = data[place : place + length].rstrip(b"\0").decode("ascii")
        elif length == 1:
            tags[tag] = place if kind == 4 else place & 0xFFFF
    return tags
