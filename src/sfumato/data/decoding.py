"""Bytes of a picture that nobody vouches for -> pixels of the asked-for shape, or a reason why not.

Only the parsers listed here ever see the bytes. Size, side ratio and byte count are capped before a pixel is decoded; truncated
files are refused, never filled in.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from sfumato.data.endings import NUMPY as NUMPY
from sfumato.data.entry import MAX_BYTES

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 80_000_000
MAX_SIDE_RATIO = 20.0
MAX_BANDS = 64
MAX_SCANS = 64  # of a progressive JPEG, each of which walks over the whole picture
MAX_PROFILE_BYTES = 4 << 20
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
Pixels = NDArray[Any]  # uint8 or uint16
Box = tuple[float, float, float, float]


class RejectedImage(Exception):
    """A picture that cannot or should not be learned from; the message is the reason, for a person."""


class quiet(warnings.catch_warnings):
    """Without the warnings of picture parsers: what is odd and matters is in the notes."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")


@dataclass(frozen=True, kw_only=True)
class PixelFormat:
    """What pictures are turned into.

    Attributes:
        shapes: (height, width) that they may take; each takes the one of the nearest aspect ratio, scaled to cover it and cropped
            at the centre.
        channels: 1 gray, 2 gray and alpha, 3 RGB, 4 RGB and alpha, more as arrays have them.
        bits: of each value, 8 or 16.
        background: RGB colour under transparent pictures where alpha is not kept.
    """

    shapes: tuple[tuple[int, int], ...]
    channels: int
    bits: Literal[8, 16] = 8
    background: tuple[int, int, int] = (255, 255, 255)

    def nearest(self, width: int, height: int) -> int:
        """Index of the shape whose aspect ratio is nearest."""
        if len(self.shapes) == 1:
            return 0
        aspect = math.log(width / height)
        return min(range(len(self.shapes)), key=lambda i: abs(math.log(self.shapes[i][1] / self.shapes[i][0]) - aspect))


class Decoded(NamedTuple):
    """A picture made ready.

    Attributes:
        pixels: (C, H, W), uint8 or uint16.
        shape: index into the format's shapes.
        size: (width, height) upright, before scaling.
        notes: what had to be done to it (`exif_rotated`, `upscaled`, ...).
        id: hash of the content, "" unless asked for: of the decoded values, so that it does not depend on the container or a
            lossless encoding; of the bytes for a JPEG, which is never decoded at full size.
    """

    pixels: Pixels
    shape: int
    size: tuple[int, int]
    notes: tuple[str, ...]
    id: str


def decode(data: bytes, form: PixelFormat, *, identify: bool = False) -> Decoded:
    """Pixels of an encoded picture.

    Raises:
        RejectedImage: with the reason.
    """
    if len(data) > MAX_BYTES:
        raise RejectedImage(f"more than {MAX_BYTES >> 20} MiB")
    if not data:
        raise RejectedImage("empty file")
    try:
        if data.startswith(NUMPY):
            return _decode_array(data, form, identify)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _decode_image(image, data, form, identify)
    except (RejectedImage, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise RejectedImage(f"not a picture in a known format ({', '.join(FORMATS)})") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise RejectedImage(f"more than {MAX_PIXELS / 1e6:.0f} million pixels") from None
    except Exception as error:  # Pillow's parsers raise OSError, SyntaxError, ValueError, struct.error, ... on damaged files
        raise RejectedImage(f"damaged: {str(error) or type(error).__name__}"[:200]) from None


def fitted(data: bytes, side: int) -> PixelFormat:
    """RGB at a picture's own aspect ratio, scaled down so that its shorter side is at most `side`."""
    try:
        if data.startswith(NUMPY):
            height, width = _array_header(data).shape[:2]
            return _within(width, height, side)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            _check_size(width, height)  # before the orientation, for which a PNG is decoded
            turned = _orientation(image, []) in (5, 6, 7, 8)
    except Exception:  # `decode` finds the reason and says it
        return PixelFormat(shapes=((side, side),), channels=3)
    return _within(height, width, side) if turned else _within(width, height, side)


def _within(width: int, height: int, side: int) -> PixelFormat:
    scale = min(1.0, side / max(1, min(width, height)))
    return PixelFormat(shapes=((max(1, round(height * scale)), max(1, round(width * scale))),), channels=3)


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise RejectedImage(f"{width} x {height}: no pixels")
    if width * height > MAX_PIXELS:
        raise RejectedImage(f"{width} x {height}: more than {MAX_PIXELS / 1e6:.0f} million pixels")
    ratio = max(width, height) / min(width, height)
    if ratio > MAX_SIDE_RATIO:
        raise RejectedImage(f"{width} x {height}: sides {ratio:.0f} : 1, more than {MAX_SIDE_RATIO:.0f} : 1")


def _covering(width: float, height: float, target: tuple[int, int]) -> Box:
    """The largest centred part of a picture with the aspect ratio of `target` (height, width)."""
    scale = min(width / target[1], height / target[0])
    left, top = (width - scale * target[1]) / 2, (height - scale * target[0]) / 2
    left, top = max(0.0, left), max(0.0, top)  # rounding must not step over the rim
    return left, top, min(width, left + scale * target[1]), min(height, top + scale * target[0])


def _decode_image(image: Image.Image, data: bytes, form: PixelFormat, identify: bool) -> Decoded:
    width, height = image.size
    _check_size(width, height)
    notes = ["animated_first_frame_used"] if getattr(image, "is_animated", False) else []
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
    stored = (target[1], target[0]) if turned else target  # the shape before the picture is turned upright
    if _upscaled(upright, target):
        notes.append("upscaled")
    # A JPEG can be decoded at 1/2, 1/4 or 1/8 size; twice the target leaves the resampling filter room to work in.
    factor = 2 * max(stored[1] / width, stored[0] / height)
    drafted = image.draft(None, (max(1, int(width * factor)), max(1, int(height * factor))))
    right, bottom = drafted[1][2:] if drafted else image.size  # a reduced JPEG's last column may be part of a pixel only
    image.load()
    if "12" in depths and image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) * 65535 // 4095).astype(np.uint16))
    image = _without_palette(image, notes)
    name = _identity(image, data, orientation) if identify else ""
    pixels = _resampled(image, _covering(right, bottom, stored), stored, form, notes)
    if orientation in UPRIGHT:
        notes.append("exif_rotated")
        pixels = _transposed(pixels, UPRIGHT[orientation])
    return Decoded(np.ascontiguousarray(pixels.transpose(2, 0, 1)), shape, upright, tuple(notes), name)


def _upscaled(size: tuple[int, int], target: tuple[int, int]) -> bool:
    return max(target[1] / size[0], target[0] / size[1]) > 1


def _depths(image: Image.Image) -> set[str]:
    """Bits of a value as they are stored, "16" for "RGB;16B"; known only until the picture is loaded."""
    return set(re.findall(r";(1[26])", " ".join(str(tile[3]) for tile in getattr(image, "tile", ()))))


def _orientation(image: Image.Image, notes: list[str]) -> int:
    """EXIF's orientation, 1 if there is none or Pillow turns the picture itself, which it does for TIFF."""
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
        raise RejectedImage(f"{kind} pixels: no telling what is black and what is white")
    if image.mode in ("P", "PA"):
        notes.append("palette_converted")
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    if image.mode == "1":
        return image.convert("L")
    if image.mode in ("L", "RGB") and "transparency" in image.info:  # one colour of a PNG declared clear
        return image.convert("RGBA")
    return image


def _identity(image: Image.Image, data: bytes, orientation: int) -> str:
    if image.format in ("JPEG", "MPO") or "icc_profile" in image.info or image.mode not in ("L", "LA", "RGB", "RGBA", "I;16"):
        return hashlib.sha256(data).hexdigest()[:32]
    return array_id(np.asarray(image), orientation)


def array_id(values: NDArray, orientation: int = 1) -> str:
    """Hash of decoded values (H, W) or (H, W, C): equal for equal pictures, however they are stored."""
    values = values[..., None] if values.ndim == 2 else values
    head = f"{values.shape} {values.dtype.kind}{values.dtype.itemsize} {orientation if orientation in UPRIGHT else 1} "
    return hashlib.sha256(head.encode() + values.tobytes()).hexdigest()[:32]


def _resampled(image: Image.Image, box: Box, target: tuple[int, int], form: PixelFormat, notes: list[str]) -> Pixels:
    """(H, W, C): cropped, scaled with antialiasing, in the colours asked for."""
    if image.mode.startswith("I;16"):
        return _resampled_array(np.asarray(image)[..., None].astype(np.uint16), box, target, form, notes)
    if form.channels not in MODES:
        raise RejectedImage(f"{len(image.getbands())} channels, where data.channels is {form.channels}")
    profile = image.info.get("icc_profile")
    if image.mode == "CMYK":
        notes.append("cmyk_converted")
    image = image.resize((target[1], target[0]), Image.Resampling.LANCZOS, box=box)
    if profile:
        image = _to_srgb(image, profile, notes)
    wanted = MODES[form.channels]
    if image.mode in ("LA", "RGBA", "La", "RGBa"):
        if np.asarray(image.getchannel("A")).min() < 255 and form.channels in (1, 3):
            notes.append("transparency_filled")
        if form.channels in (1, 3):
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*form.background, 255)), image.convert("RGBA"))
    pixels = np.asarray(image if image.mode == wanted else image.convert(wanted)).reshape(*target, form.channels)
    return pixels.astype(np.uint16) * np.uint16(257) if form.bits == 16 else pixels


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From the profile's colours to sRGB; None if that is what they are, whatever the profile is called."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent)
    if mode != "RGB":
        return transform
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
    converted = ImageCms.applyTransform(Image.fromarray(colours), transform)
    changed = np.abs(np.asarray(converted).astype(int) - colours).max()
    return transform if changed > 2 else None  # 2: what rounding in a profile's tables comes to


def _to_srgb(image: Image.Image, profile: bytes, notes: list[str]) -> Image.Image:
    colours, alpha = (image.convert("RGB"), image.getchannel("A")) if image.mode == "RGBA" else (image, None)
    if colours.mode not in ("L", "RGB", "CMYK") or len(profile) > MAX_PROFILE_BYTES:
        notes.append("icc_profile_ignored")
        return image
    try:
        transform = _transform(profile, colours.mode)
        if transform is None:
            return image
        converted = ImageCms.applyTransform(colours, transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        notes.append("icc_profile_ignored")
        return image
    if converted is None:
        return image
    notes.append("icc_converted_to_srgb")
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _transposed(pixels: Pixels, method: Image.Transpose) -> Pixels:
    """What Pillow's transpose does, for any number of channels."""
    turns = {Image.Transpose.ROTATE_90: 1, Image.Transpose.ROTATE_180: 2, Image.Transpose.ROTATE_270: 3}
    if method in turns:
        return np.rot90(pixels, turns[method])
    if method == Image.Transpose.FLIP_LEFT_RIGHT:
        return pixels[:, ::-1]
    if method == Image.Transpose.FLIP_TOP_BOTTOM:
        return pixels[::-1]
    swapped = pixels.swapaxes(0, 1)
    return swapped if method == Image.Transpose.TRANSPOSE else swapped[::-1, ::-1]


class ArrayHeader(NamedTuple):
    """What an .npy says of itself, and where its values begin."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    offset: int

    @classmethod
    def of(cls, data: bytes) -> ArrayHeader:
        """Of bytes that begin as an .npy does.

        Raises:
            ValueError: if they do not go on so.
        """
        stream = io.BytesIO(data)
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("an array of an unknown format")
        try:
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        except MemoryError:  # what Python's parser says to brackets without end
            raise ValueError("the array's header") from None
        return cls(shape, dtype, fortran, stream.tell())


def _array_header(data: bytes) -> ArrayHeader:
    header = ArrayHeader.of(data)
    shape, dtype = header.shape, header.dtype
    bands = shape[2] if len(shape) == 3 else 1
    if dtype not in (np.uint8, np.uint16) or header.fortran or len(shape) not in (2, 3) or not 1 <= bands <= MAX_BANDS:
        raise RejectedImage(f"an array of {dtype} {shape}; pictures are (H, W) or (H, W, C) of uint8 or uint16")
    _check_size(shape[1], shape[0])
    return header


def _decode_array(data: bytes, form: PixelFormat, identify: bool) -> Decoded:
    """A picture stored as .npy, (H, W) or (H, W, C) of uint8 or uint16."""
    header = _array_header(data)
    height, width = header.shape[:2]
    values = np.frombuffer(data, header.dtype, offset=header.offset)
    if values.size != math.prod(header.shape):
        raise RejectedImage("damaged: the array is cut short")
    values = values.reshape(height, width, -1)
    shape_index = form.nearest(width, height)
    target = form.shapes[shape_index]
    notes = ["upscaled"] if _upscaled((width, height), target) else []
    box = _covering(width, height, target)
    if values.dtype == np.uint8 and values.shape[2] in MODES:
        image = Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)
        pixels = _resampled(image, box, target, form, notes)
    else:
        pixels = _resampled_array(values, box, target, form, notes)
    name = array_id(values) if identify else ""
    return Decoded(np.ascontiguousarray(pixels.transpose(2, 0, 1)), shape_index, (width, height), tuple(notes), name)


def _resampled_array(values: NDArray, box: Box, target: tuple[int, int], form: PixelFormat, notes: list[str]) -> Pixels:
    """As `_resampled`, for what Pillow has no mode for: each channel by itself, in floating point."""
    bands = values.shape[2]
    if bands != form.channels and not (bands == 1 and form.channels in MODES):
        raise RejectedImage(f"{bands} channels, where data.channels is {form.channels}")
    if values.dtype == np.uint16 and form.bits == 8:
        notes.append("sixteen_bit_reduced")
    factor = (2**form.bits - 1) / (65535 if values.dtype == np.uint16 else 255)
    size = (target[1], target[0])
    planes = (Image.fromarray(values[..., band].astype(np.float32)) for band in range(bands))
    scaled = np.stack([np.asarray(plane.resize(size, Image.Resampling.LANCZOS, box=box)) for plane in planes], axis=2)
    pixels = np.rint(scaled * factor).clip(0, 2**form.bits - 1).astype(np.uint8 if form.bits == 8 else np.uint16)
    if bands == form.channels:
        return pixels
    pixels = np.repeat(pixels, form.channels, axis=2)
    if form.channels in (2, 4):
        pixels[..., -1] = 2**form.bits - 1  # gray without alpha is opaque
    return pixels
