"""Bytes of a picture that nobody vouches for -> uint8 pixels of the asked-for shape, or a reason why not.

Only the parsers listed here ever see the bytes. Size, side ratio and byte count are capped before a pixel is decoded; truncated
files are refused, never filled in.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_BYTES = 256 << 20
MAX_PIXELS = 80_000_000
MAX_SIDE_RATIO = 20.0
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation
Channels = Literal[1, 3]


class RejectedImage(Exception):
    """A picture that cannot or should not be learned from; the message is the reason, for a person."""


@dataclass(frozen=True, kw_only=True)
class PixelFormat:
    """What pictures are turned into: resolution x resolution, centre-cropped, on `background` where they are transparent."""

    resolution: int
    channels: Channels
    background: tuple[int, int, int] = (255, 255, 255)


def decode(data: bytes, form: PixelFormat) -> tuple[NDArray[np.uint8], list[str]]:
    """Pixels (C, R, R) of an encoded picture, and what had to be done to it (`exif_rotated`, `upscaled`, ...).

    Raises:
        RejectedImage: with the reason.
    """
    if len(data) > MAX_BYTES:
        raise RejectedImage(f"more than {MAX_BYTES >> 20} MiB")
    if not data:
        raise RejectedImage("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is odd and matters is in the notes
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return _convert(image, form)
    except (RejectedImage, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise RejectedImage(f"not a picture in a known format ({', '.join(FORMATS)})") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise RejectedImage(f"more than {MAX_PIXELS / 1e6:.0f} million pixels") from None
    except Exception as error:  # Pillow's parsers raise OSError, SyntaxError, ValueError, struct.error, ... on damaged files
        raise RejectedImage(f"damaged: {str(error) or type(error).__name__}"[:200]) from None


def _convert(image: Image.Image, form: PixelFormat) -> tuple[NDArray[np.uint8], list[str]]:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise RejectedImage(f"{width} x {height}: more than {MAX_PIXELS / 1e6:.0f} million pixels")
    ratio = max(width, height) / min(width, height)
    if ratio > MAX_SIDE_RATIO:
        raise RejectedImage(f"{width} x {height}: sides {ratio:.0f} : 1, more than {MAX_SIDE_RATIO:.0f} : 1")
    notes = []
    shorter = min(width, height)
    if shorter < form.resolution:
        notes.append("upscaled")
    if getattr(image, "n_frames", 1) > 1:
        notes.append("animated_first_frame_used")
    # A JPEG can be decoded at 1/2, 1/4 or 1/8 size; twice the target leaves the resampling filter room to work in.
    factor = 2 * form.resolution / shorter
    drafted = image.draft(None, (max(1, int(width * factor)), max(1, int(height * factor))))
    right, bottom = drafted[1][2:] if drafted else image.size  # a reduced JPEG's last column may be part of a pixel only
    orientation = image.getexif().get(0x0112)
    image, mode_note = _to_channels(image, form)
    notes += mode_note
    side = min(right, bottom)
    left, top = (right - side) / 2, (bottom - side) / 2
    size = (form.resolution, form.resolution)
    image = image.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    if orientation in UPRIGHT:
        notes.append("exif_rotated")
        image = image.transpose(UPRIGHT[orientation])
    pixels = np.asarray(image, dtype=np.uint8).reshape(form.resolution, form.resolution, form.channels)
    return pixels.transpose(2, 0, 1).copy(), notes


def _to_channels(image: Image.Image, form: PixelFormat) -> tuple[Image.Image, list[str]]:
    """The picture in mode L or RGB, whatever it came in."""
    wanted, notes = ("L" if form.channels == 1 else "RGB"), []
    mode = image.mode
    if mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
        notes.append("sixteen_bit_reduced")
    elif mode in ("F", "I"):
        kind = "floating-point" if mode == "F" else "32-bit integer"
        raise RejectedImage(f"{kind} pixels: no telling what is black and what is white")
    elif mode == "CMYK":
        notes.append("cmyk_converted")
    elif mode == "P":
        notes.append("palette_converted")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if np.asarray(rgba.getchannel("A")).min() < 255:
            notes.append("transparency_filled")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*form.background, 255)), rgba)
    elif mode == "P":
        image = image.convert("RGB")
    return image.convert(wanted), notes
