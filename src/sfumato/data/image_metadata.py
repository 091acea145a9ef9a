"""What image files say besides their pixels, such as places, cameras and comments, is left out of
copies that are handed on. Nothing is decoded, so that pixels stay as they are.

Sources: JPEG, ITU T.81 annex B; Exif 2.32; PNG, W3C 2003, sec. 5 and 11; WebP container
specification, RFC 9649 sec. 2.7.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

from PIL import Image

from sfumato.data.file_types import NUMPY

ORIENTATION = 0x0112
JPEG, PNG, RIFF = b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"RIFF"
FILL, START_OF_SCAN, END, COMMENT, APP0 = 0xFF, 0xDA, 0xD9, 0xFE, 0xE0
IN_SCAN = {0x00, *range(0xD0, 0xD8)}  # what follows FF within a scan: a stuffed byte, a restart
# application segments that change how pixels are read: JFIF, colour profiles, Adobe's transform
KEPT_APPS = {0xE0: b"JFIF\0", 0xE2: b"ICC_PROFILE", 0xEE: b"Adobe"}
PNG_KEPT = {
    b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"cHRM", b"gAMA", b"iCCP", b"sBIT", b"sRGB", b"cICP",
    b"mDCV", b"cLLI", b"bKGD", b"hIST", b"pHYs", b"sPLT", b"acTL", b"fcTL", b"fdAT",
}  # fmt: skip
WEBP_METADATA = {b"EXIF", b"XMP "}
WEBP_FLAGS = 0b1100  # of the extended header: has Exif, has XMP


def without_metadata(data: bytes) -> bytes:
    """Return an image file without Exif, XMP, comments and what follows the image; the orientation of
    a photo is kept.

    JPEG, PNG and WebP are rewritten; other formats are returned as they are.

    Raises:
        ValueError: if the file is damaged, so that it cannot be told what is metadata.
    """
    try:
        if data.startswith(JPEG):
            return b"".join(_jpeg(data))
        if data.startswith(PNG):
            return b"".join(_png(data))
        if data.startswith(RIFF) and data[8:12] == b"WEBP":
            return _webp(data)
    except (struct.error, IndexError):
        raise ValueError("is cut or damaged") from None
    return data


def keeps_metadata(data: bytes) -> bool:
    """Return whether a file is of a format whose metadata cannot be left out here."""
    return not data.startswith((JPEG, PNG, NUMPY)) and not (
        data.startswith(RIFF) and data[8:12] == b"WEBP"
    )


def orientation_of(data: bytes) -> int:
    """Return the orientation that a file's Exif says, 1 to 8; 1 if it says none."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # whatever the parser raises on a damaged file
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _orientation_only(data: bytes) -> bytes:
    """Return Exif data that hold the orientation alone; b"" for upright images."""
    orientation = orientation_of(data)
    if orientation == 1:
        return b""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif.tobytes()


def _jpeg(data: bytes) -> Iterator[bytes]:
    """Yield the segments and scans of the first image; a second one, or a film, may follow it."""
    yield JPEG
    exif = _orientation_only(data)
    at, begins = 2, True
    while True:
        if data[at] != FILL:
            raise struct.error("no marker")
        while data[at + 1] == FILL:
            at += 1
        marker = data[at + 1]
        if marker == END:
            yield data[at : at + 2]
            return
        (length,) = struct.unpack_from(">H", data, at + 2)
        segment = data[at : at + 2 + length]
        if begins and marker != APP0:
            begins = False
            if exif:
                yield b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif
        is_app = APP0 <= marker <= 0xEF
        kept = marker in KEPT_APPS and segment[4:].startswith(KEPT_APPS[marker])
        if kept or (not is_app and marker != COMMENT):
            yield segment
        at += 2 + length
        if marker == START_OF_SCAN:
            begin = at
            at = _end_of_scan(data, at)
            yield data[begin:at]


def _end_of_scan(data: bytes, at: int) -> int:
    """Return where the marker after a scan begins."""
    while True:
        at = data.find(b"\xff", at)
        if at < 0:
            raise struct.error("no end")
        if data[at + 1] not in IN_SCAN and data[at + 1] != FILL:
            return at
        at += 1 if data[at + 1] == FILL else 2


def _png(data: bytes) -> Iterator[bytes]:
    yield PNG
    at = len(PNG)
    exif = _orientation_only(data).removeprefix(b"Exif\0\0")
    while True:
        (length,), kind = struct.unpack_from(">I", data, at), data[at + 4 : at + 8]
        chunk = data[at : at + 12 + length]
        if len(chunk) < 12 + length:
            raise struct.error("cut")
        if kind == b"IDAT" and exif:
            yield _png_chunk(b"eXIf", exif)
            exif = b""
        if kind in PNG_KEPT:
            yield chunk
        if kind == b"IEND":
            return
        at += 12 + length


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _webp(data: bytes) -> bytes:
    exif = _orientation_only(data).removeprefix(b"Exif\0\0")
    chunks, at = [], 12
    end = 8 + struct.unpack_from("<I", data, 4)[0]
    if end > len(data):
        raise struct.error("cut")
    while at + 8 <= end:
        kind, (length,) = data[at : at + 4], struct.unpack_from("<I", data, at + 4)
        body = data[at + 8 : at + 8 + length]
        if len(body) < length:
            raise struct.error("cut")
        if kind == b"VP8X":
            flags = body[0] & ~WEBP_FLAGS | (0b1000 if exif else 0)
            body = bytes([flags]) + body[1:]
        if kind not in WEBP_METADATA:
            chunks.append((kind, body))
        at += 8 + length + length % 2
    if exif:
        chunks.append((b"EXIF", exif))
    content = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
        for kind, body in chunks
    )
    return RIFF + struct.pack("<I", len(content)) + content
