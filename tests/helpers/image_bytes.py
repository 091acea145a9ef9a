"""Images as bytes: ordinary ones by Pillow, odd ones chunk by chunk."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def noise(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    """An RGB image without any symmetry."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """An RGB image that JPEG keeps nearly as it is."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [np.sin(5 * x + 2 * y), np.cos(4 * y - x), np.sin(7 * x * y)]
    return (127.5 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


def encode(photo: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    """Bytes of an image in one of Pillow's formats."""
    buffer = io.BytesIO()
    image = photo if isinstance(photo, Image.Image) else Image.fromarray(photo)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int, height: int, *, depth: int, colour: int, rows: bytes, extra: bytes = b""
) -> bytes:
    """A PNG of any bit depth and colour type: 0 gray, 2 RGB, 4 gray with alpha, 6 RGBA; each row
    begins with its filter's byte.
    """
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
