"""Decoding of untrusted image bytes to pixels of a given shape, or to the reason why that is
refused.

Only the parsers listed here ever see the bytes. Size, side ratio and byte count are capped before a
pixel is decoded; truncated files are refused, never filled in. Ordinary 8-bit images are scaled by
Pillow; all others become `RawImage`, which share one path.
"""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from sfumato.data import gif, tiff
from sfumato.data.colours import to_srgb
from sfumato.data.file_types import NUMPY, SUFFIXES
from sfumato.data.listing import MAX_BYTES
from sfumato.data.npy import ArrayHeader, array_header, read_array
from sfumato.data.pixel_format import (
    MAX_BANDS,
    MAX_PIXELS,
    UPRIGHT,
    Box,
    PixelFormat,
    Pixels,
    RawImage,
    RejectedImage,
    Scale,
    array_id,
    check_size,
    covering_box,
    premultiply,
    quiet,
    resample,
    transpose,
)
from sfumato.data.png16 import is_deep_colour, read_deep_colour

__all__ = [
    "FORMATS",
    "MAX_BANDS",
    "MAX_BYTES",
    "MAX_PIXELS",
    "NUMPY",
    "SUFFIXES",
    "ArrayHeader",
    "Decoded",
    "ImageHeader",
    "PixelFormat",
    "Pixels",
    "RawImage",
    "RejectedImage",
    "Scale",
    "array_id",
    "decode",
    "fit_within",
    "quiet",
    "read_header",
    "read_raw",
]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_SCANS = 64  # of a progressive JPEG, each of which walks over the whole image
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
# of Pillow's modes; else 3
BANDS = {"1": 1, "L": 1, "I;16": 1, "I;16B": 1, "LA": 2, "La": 2, "PA": 4, "RGBA": 4, "RGBa": 4}
WITH_ALPHA = ("LA", "RGBA", "La", "RGBa")


class Decoded(NamedTuple):
    """A decoded image.

    Attributes:
        pixels: (C, H, W), uint8 or uint16.
        shape: index into the format's shapes.
        size: (width, height) upright, before scaling.
        notes: what had to be done to it (`exif_rotated`, `upscaled`, ...).
        id: hash of the content, "" unless requested: of the decoded values, so that it does not
            depend on the container or a
            lossless encoding; of the bytes for a JPEG, which is never decoded at full size.
        frames: images that the file holds, of which this is the first.
    """

    pixels: Pixels
    shape: int
    size: tuple[int, int]
    notes: tuple[str, ...]
    id: str
    frames: int = 1


class ImageHeader(NamedTuple):
    """What a file's header says.

    Attributes:
        size: (width, height) upright.
        bands: channels, alpha included.
        alpha: whether the last one is alpha.
        dtype: of the values as they are stored.
    """

    size: tuple[int, int]
    bands: int
    alpha: bool
    dtype: np.dtype


def read_header(data: bytes) -> ImageHeader:
    """Read the header of an encoded image without decoding its pixels.

    Raises:
        RejectedImage: if `decode` would refuse it because of its header.
    """
    with _reasons(data):
        if data.startswith(NUMPY):
            header = array_header(data)
            return ImageHeader(
                (header.shape[1], header.shape[0]),
                header.shape[2] if len(header.shape) == 3 else 1,
                False,
                header.dtype,
            )
        if (page := _page_beyond_pillow(data)) is not None:
            check_size(page.width, page.height)
            size = (page.height, page.width) if page.turned else (page.width, page.height)
            tiff.require_readable(page)
            return ImageHeader(size, page.bands, page.alpha, page.dtype)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            check_size(width, height)  # before the orientation, for which a PNG is decoded
            deep = image.mode.startswith("I;16") or is_deep_colour(data)
            clear = image.mode in WITH_ALPHA or image.has_transparency_data
            bands = BANDS.get(image.mode, 3)
            bands += clear and bands in (1, 3)
            turned = _orientation(image, []) in (5, 6, 7, 8)
            return ImageHeader(
                (height, width) if turned else (width, height),
                bands,
                clear,
                np.dtype(np.uint16 if deep else np.uint8),
            )
    raise AssertionError


class _reasons:
    """A context that turns whatever parsers raise on damaged files into a RejectedImage with a
    readable reason.
    """

    def __init__(self, data: bytes) -> None:
        if len(data) > MAX_BYTES:
            raise RejectedImage(f"more than {MAX_BYTES >> 20} MiB")
        if not data:
            raise RejectedImage("empty file")

    def __enter__(self) -> None:
        """Enter the context."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if (
            error is None
            or isinstance(error, RejectedImage | MemoryError)
            or not isinstance(error, Exception)
        ):
            return
        if isinstance(error, UnidentifiedImageError):
            raise RejectedImage(f"not an image in a known format ({', '.join(FORMATS)})") from None
        if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
            raise RejectedImage(f"more than {MAX_PIXELS / 1e6:.0f} million pixels") from None
        # Pillow's parsers raise OSError, SyntaxError, ValueError, struct.error, ...
        raise RejectedImage(f"damaged: {str(error) or type(error).__name__}"[:200]) from None


def decode(data: bytes, form: PixelFormat, *, identify: bool = False) -> Decoded:
    """Decode an encoded image to pixels of the format `form`.

    Args:
        identify: whether to hash the content too.
    Raises:
        RejectedImage: with the reason.
    """
    with _reasons(data):
        notes: list[str] = []
        raw = _read_without_pillow(data, notes)
        if raw is not None:
            frames = len(tiff.frames(data)) if tiff.is_tiff(data) else 1
            return _decode_raw(raw, form, notes, array_id(raw.array) if identify else "", frames)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _decode_image(image, data, form, identify)
    raise AssertionError


def read_raw(data: bytes) -> RawImage:
    """Read all values of an image as they are stored; it may not be upright.

    Raises:
        RejectedImage: with the reason.
    """
    with _reasons(data):
        raw = _read_without_pillow(data, [])
        if raw is not None:
            return raw
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_size(*image.size)
            depths = _depths(image)
            image.load()
            return _raw_of(_without_palette(image, []), depths)
    raise AssertionError


def fit_within(data: bytes, side: int, form: PixelFormat | None = None) -> PixelFormat:
    """Return a format with an image's aspect ratio and a shorter side of at most `side` pixels.

    It is RGB unless `form` is given. An image is never enlarged.
    """
    form = PixelFormat(shapes=((side, side),), channels=3) if form is None else form
    try:
        width, height = read_header(data).size
    except RejectedImage:  # `decode` finds the reason and says it
        return replace(form, shapes=((side, side),))
    scale = min(1.0, side / max(1, min(width, height)))
    return replace(form, shapes=((max(1, round(height * scale)), max(1, round(width * scale))),))


def _page_beyond_pillow(data: bytes) -> tiff.Page | None:
    """Return the first page of a TIFF that Pillow does not read value for value, else None."""
    page = tiff.first_page(data) if tiff.is_tiff(data) else None
    unknown = data[:4] == tiff.BIG[1]  # of those, Pillow reads little-endian ones only
    return None if page is None or (page.exact_in_pillow and not unknown) else page


def _read_without_pillow(data: bytes, notes: list[str]) -> RawImage | None:
    """Read the values of a file that is not left to Pillow; None if it is."""
    if data.startswith(NUMPY):
        return read_array(data)
    if (page := _page_beyond_pillow(data)) is not None:
        if page.one(tiff.ORIENTATION, 1) in UPRIGHT:
            notes.append("exif_rotated")
        return tiff.read_page(data, page)
    return read_deep_colour(data) if is_deep_colour(data) else None


def _decode_raw(
    raw: RawImage, form: PixelFormat, notes: list[str], name: str, frames: int
) -> Decoded:
    height, width, bands = raw.array.shape
    shape = form.nearest(width, height)
    target = form.shapes[shape]
    if _needs_upscaling((width, height), target):
        notes.append("upscaled")
    if frames > 1:
        notes.append("animated_first_frame_used")
    box = covering_box(width, height, target)
    if (
        raw.kind == "bytes"
        and form.scale.bytes is None
        and bands in (1, 3)
        and form.channels in MODES
    ):
        array = np.ascontiguousarray(raw.array)
        pixels = _resample_with_pillow(
            Image.fromarray(array[..., 0] if bands == 1 else array), box, target, form, notes
        )
    else:
        pixels = resample(raw, box, target, form, notes)
    return Decoded(
        np.ascontiguousarray(pixels.transpose(2, 0, 1)),
        shape,
        (width, height),
        tuple(notes),
        name,
        frames,
    )


def _decode_image(image: Image.Image, data: bytes, form: PixelFormat, identify: bool) -> Decoded:
    width, height = image.size
    check_size(width, height)
    frames = _frames(image, data)
    notes = ["animated_first_frame_used"] if frames > 1 else []
    if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_SCANS:
        raise RejectedImage(f"a JPEG of more than {MAX_SCANS} scans")
    depths = _depths(image)
    if "16" in depths and not image.mode.startswith("I;16"):
        notes.append("sixteen_bit_reduced")  # Pillow reads 16-bit colour as 8-bit
    orientation = _orientation(image, notes)
    turned = orientation in (5, 6, 7, 8)
    upright = (height, width) if turned else (width, height)
    shape = form.nearest(*upright)
    target = form.shapes[shape]
    # the shape before the image is turned upright
    stored = (target[1], target[0]) if turned else target
    if _needs_upscaling(upright, target):
        notes.append("upscaled")
    # A JPEG can be decoded at 1/2, 1/4 or 1/8 size; twice the target leaves the resampling filter
    # room to work in.
    factor = 2 * max(stored[1] / width, stored[0] / height)
    drafted = image.draft(None, (max(1, int(width * factor)), max(1, int(height * factor))))
    # a reduced JPEG's last column may be part of a pixel only
    right, bottom = drafted[1][2:] if drafted else image.size
    image.load()
    image = _without_palette(image, notes)
    name = _identity(image, data, orientation) if identify else ""
    box = covering_box(right, bottom, stored)
    ranged = form.scale.bytes is not None or (form.alpha == "off" and image.mode in WITH_ALPHA)
    if image.mode.startswith("I;16") or ranged:
        pixels = resample(_raw_of(_in_srgb(image, notes), depths), box, stored, form, notes)
    else:
        pixels = _resample_with_pillow(image, box, stored, form, notes)
    if orientation in UPRIGHT:
        notes.append("exif_rotated")
        pixels = transpose(pixels, UPRIGHT[orientation])
    return Decoded(
        np.ascontiguousarray(pixels.transpose(2, 0, 1)), shape, upright, tuple(notes), name, frames
    )


def _frames(image: Image.Image, data: bytes) -> int:
    if image.format == "TIFF":
        return len(tiff.frames(data))
    return gif.frames(data) if image.format == "GIF" else int(getattr(image, "n_frames", 1))


def _raw_of(image: Image.Image, depths: set[str]) -> RawImage:
    """Return the values of an image in one of Pillow's plain modes."""
    array = np.asarray(image)
    array = array[..., None] if array.ndim == 2 else array
    if image.mode.startswith("I;16"):
        return RawImage(array.astype(np.uint16), white=4095.0 if "12" in depths else None)
    return RawImage(array, alpha=image.mode in WITH_ALPHA)


def _in_srgb(image: Image.Image, notes: list[str]) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode == "CMYK":
        notes.append("cmyk_converted")
    image = (
        to_srgb(image, profile, notes) if profile and not image.mode.startswith("I;16") else image
    )
    return image if image.mode in (*MODES.values(), "I;16", "I;16B") else image.convert("RGB")


def _needs_upscaling(size: tuple[int, int], target: tuple[int, int]) -> bool:
    return max(target[1] / size[0], target[0] / size[1]) > 1


def _depths(image: Image.Image) -> set[str]:
    """Return the depths "12" and "16" among an image's tiles, such as "16" for "RGB;16B".

    They are known only until the image is loaded.
    """
    return set(
        re.findall(r";(1[26])", " ".join(str(tile[3]) for tile in getattr(image, "tile", ())))
    )


def _orientation(image: Image.Image, notes: list[str]) -> int:
    """Return the EXIF orientation; 1 if there is none.

    1 for TIFF too, which Pillow turns upright itself.
    """
    try:
        orientation = int(image.getexif().get(0x0112, 1))
    except Exception:  # as in `decode`: whatever the parser raises
        notes.append("exif_damaged")
        return 1
    if image.format != "TIFF":
        return orientation
    if orientation in UPRIGHT:
        notes.append("exif_rotated")
    return 1


def _without_palette(image: Image.Image, notes: list[str]) -> Image.Image:
    if image.mode in ("F", "I"):
        kind = "floating-point" if image.mode == "F" else "32-bit integer"
        raise RejectedImage(f"{kind} pixels: unknown value range")
    if image.mode in ("P", "PA"):
        notes.append("palette_converted")
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    if image.mode == "1":
        return image.convert("L")
    # one colour of a PNG declared clear
    if image.mode in ("L", "RGB") and "transparency" in image.info:
        return image.convert("RGBA")
    return image


def _identity(image: Image.Image, data: bytes, orientation: int) -> str:
    if (
        image.format in ("JPEG", "MPO")
        or "icc_profile" in image.info
        or image.mode not in ("L", "LA", "RGB", "RGBA", "I;16")
    ):
        return hashlib.sha256(data).hexdigest()[:32]
    return array_id(np.asarray(image), orientation)


def _resample_with_pillow(
    image: Image.Image, box: Box, target: tuple[int, int], form: PixelFormat, notes: list[str]
) -> Pixels:
    """Crop an image to `box`, scale it with antialiasing and convert its colours: (H, W, C)."""
    if form.channels not in MODES:
        raise RejectedImage(
            f"{len(image.getbands())} channels, where data.channels is {form.channels}"
        )
    profile = image.info.get("icc_profile")
    if image.mode == "CMYK":
        notes.append("cmyk_converted")
    image = image.resize((target[1], target[0]), Image.Resampling.LANCZOS, box=box)
    if profile:
        image = to_srgb(image, profile, notes)
    mode = MODES[form.channels]
    if image.mode in ("LA", "RGBA", "La", "RGBa"):
        if np.asarray(image.getchannel("A")).min() < 255 and form.channels in (1, 3):
            notes.append("transparency_filled")
        if form.channels in (1, 3):
            image = Image.alpha_composite(
                Image.new("RGBA", image.size, (*form.background, 255)), image.convert("RGBA")
            )
    pixels = np.asarray(image if image.mode == mode else image.convert(mode)).reshape(
        *target, form.channels
    )
    if form.channels in (2, 4):
        pixels = premultiply(pixels)
    return pixels.astype(np.uint16) * np.uint16(257) if form.bits == 16 else pixels
