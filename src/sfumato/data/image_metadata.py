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

ORIENTATION = 0x0112
JPEG, PNG, RIFF = b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"RIFF"
START_OF_SCAN, COMMENT, APP0 = 0xDA, 0xFE, 0xE0
# application segments that change how pixels are read: JFIF, colour profiles, Adobe's transform
KEPT_APPS = {0xE0: b"", 0xE2: b"ICC_PROFILE", 0xEE: b"Adobe"}
PNG_METADATA = {b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"tIME", b"dSIG"}
WEBP_METADATA = {b"EXIF", b"XMP "}
WEBP_FLAGS = 0b1100  # of the extended header: has Exif, has XMP


def without_metadata(data: bytes) -> bytes:
    """Return an image file without Exif, XMP and comments; the orientation of a photo is kept.

    JPEG, PNG and WebP are rewritten; other formats, and files that are damaged, are returned as
    they are.
    """
    try:
        if data.startswith(JPEG):
            return b"".join(_jpeg(data))
        if data.startswith(PNG):
            return b"".join(_png(data))
        if data.startswith(RIFF) and data[8:12] == b"WEBP":
            return _webp(data)
    except (struct.error, IndexError):
        return data
    return data


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
    yield JPEG
    exif = _orientation_only(data)
    at, begins = 2, True
    while True:
        if data[at] != 0xFF:
            raise struct.error("no marker")
        marker, (length,) = data[at + 1], struct.unpack_from(">H", data, at + 2)
        segment = data[at : at + 2 + length]
        if begins and marker != APP0:
            begins = False
            if exif:
                yield b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif
        if marker == START_OF_SCAN:
            yield data[at:]
            return
        is_app = 0xE0 <= marker <= 0xEF
        kept = marker in KEPT_APPS and segment[4:].startswith(KEPT_APPS[marker])
        if kept or (not is_app and marker != COMMENT):
            yield segment
        at += 2 + length


def _png(data: bytes) -> Iterator[bytes]:
    yield PNG
    at = len(PNG)
    exif = _orientation_only(data).removeprefix(b"Exif\0\0")
    while at < len(data):
        (length,), kind = struct.unpack_from(">I", data, at), data[at + 4 : at + 8]
        if kind == b"IDAT" and exif:
            yield _png_chunk(b"eXIf", exif)
            exif = b""
        if kind not in PNG_METADATA:
            yield data[at : at + 12 + length]
        at += 12 + length


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _webp(data: bytes) -> bytes:
    exif = _orientation_only(data).removeprefix(b"Exif\0\0")
    chunks, at = [], 12
    while at + 8 <= len(data):
        kind, (length,) = data[at : at + 4], struct.unpack_from("<I", data, at + 4)
        body = data[at + 8 : at + 8 + length]
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
