"""The values of an image file as its container holds them, and the only conversion from those to
the pixels that training sees.

Readers of containers return a `RawImage`; nothing here knows where it comes from, so that equal
values give equal pixels.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_PIXELS = 80_000_000
MAX_SIDE_RATIO = 20.0
MAX_BANDS = 64
CUT_SHARE = 0.01  # of an image's values outside the range, above which it is noted
LUMA = (0.299, 0.587, 0.114)
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation
Pixels = NDArray[Any]  # uint8 or uint16
Box = tuple[float, float, float, float]
Range = tuple[float, float]
Kind = Literal["bytes", "integers", "floats"]


class RejectedImage(Exception):
    """An image that cannot or should not be learned from; the message is the reason."""


class quiet(warnings.catch_warnings):
    """A context that silences the warnings of image parsers; what is unusual and matters is in the
    notes.
    """

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The values that black and white stand for, by kind of number; None where the number's type
    determines them.

    Attributes:
        bytes: of unsigned 8-bit integers; by default 0 and 255.
        integers: of all others; by default 0 and the largest that the container holds, for unsigned
            ones up to 16 bits.
        floats: of floating-point values; by default 0 and 1, for images within.
    """

    bytes: Range | None = None
    integers: Range | None = None
    floats: Range | None = None

    @property
    def range(self) -> Range | None:
        """The first range that is not the default, in the order of bytes, integers and floats."""
        return self.bytes or self.integers or self.floats

    def __repr__(self) -> str:
        ranges = (
            f"{field.name}={limits}"
            for field in fields(self)
            if (limits := getattr(self, field.name)) is not None
        )
        return f"Scale({', '.join(ranges)})"


@dataclass(frozen=True, kw_only=True, repr=False)
class PixelFormat:
    """The format that images are converted to.

    Attributes:
        shapes: (height, width) that they may take; each takes the one of the nearest aspect ratio,
            scaled to cover it and cropped
            at the centre.
        channels: 1 gray, 2 gray and alpha, 3 RGB, 4 RGB and alpha, more as arrays have them.
        bits: of each value, 8 or 16.
        background: RGB colour under transparent images where alpha is not kept.
        alpha: whether the last channel of an image of 2 or 4 is alpha: `auto` where its container
            says so, `on`, or `off`. With alpha,
            pixels of 2 and 4 channels are premultiplied: colour times alpha.
        scale: which values are black and white.
    """

    shapes: tuple[tuple[int, int], ...]
    channels: int
    bits: Literal[8, 16] = 8
    background: tuple[int, int, int] = (255, 255, 255)
    alpha: Literal["auto", "on", "off"] = "auto"
    scale: Scale = Scale()

    def __repr__(self) -> str:
        """Return the text that is part of cache keys and fingerprints.

        Where `alpha` and `scale` change nothing, it is the text from before they were settings, so
        that earlier caches stay valid.
        """
        more = "" if self.scale == Scale() else f", scale={self.scale!r}"
        if self.channels in (2, 4) or self.alpha != "auto":
            more += f", alpha={self.alpha!r}, premultiplied"
        return (
            f"PixelFormat(shapes={self.shapes!r}, channels={self.channels!r}, bits={self.bits!r}, "
            f"background={self.background!r}{more})"
        )

    def nearest(self, width: int, height: int) -> int:
        """Return the index of the shape with the nearest aspect ratio."""
        if len(self.shapes) == 1:
            return 0
        aspect = math.log(width / height)
        return min(
            range(len(self.shapes)),
            key=lambda i: abs(math.log(self.shapes[i][1] / self.shapes[i][0]) - aspect),
        )


class RawImage(NamedTuple):
    """The values of an image, as its file holds them.

    Attributes:
        array: (H, W, C) of integers or floating-point numbers, black smaller than white.
        alpha: whether the container says that the last channel is alpha, not multiplied into the
            others.
        white: the largest value that its integers can hold where that is less than their type's, as
            for 12 bits; else None.
    """

    array: NDArray[Any]
    alpha: bool = False
    white: float | None = None

    @property
    def kind(self) -> Kind:
        """The kind of the values, which decides which range of a `Scale` applies."""
        return kind_of(self.array.dtype)

    def colours(self) -> NDArray[Any]:
        """Return all channels except alpha."""
        return self.array[..., :-1] if self.alpha else self.array


def is_numeric(dtype: np.dtype) -> bool:
    """Return whether values of a dtype can be pixels."""
    return dtype.kind in "uif" and dtype.itemsize <= 8


def kind_of(dtype: np.dtype) -> Kind:
    """Return the kind of a dtype, which decides which range of a `Scale` applies."""
    return "floats" if dtype.kind == "f" else "bytes" if dtype == np.uint8 else "integers"


def check_size(width: int, height: int) -> None:
    """Raise RejectedImage for sizes that are never decoded."""
    if width < 1 or height < 1:
        raise RejectedImage(f"{width} x {height}: no pixels")
    if width * height > MAX_PIXELS:
        raise RejectedImage(f"{width} x {height}: more than {MAX_PIXELS / 1e6:.0f} million pixels")
    ratio = max(width, height) / min(width, height)
    if ratio > MAX_SIDE_RATIO:
        raise RejectedImage(
            f"{width} x {height}: sides {ratio:.0f} : 1, more than {MAX_SIDE_RATIO:.0f} : 1"
        )


def covering_box(width: float, height: float, target: tuple[int, int]) -> Box:
    """Return the largest centred box with the aspect ratio of `target` (height, width)."""
    scale = min(width / target[1], height / target[0])
    left, top = (width - scale * target[1]) / 2, (height - scale * target[0]) / 2
    left, top = max(0.0, left), max(0.0, top)  # rounding must not step over the rim
    return left, top, min(width, left + scale * target[1]), min(height, top + scale * target[0])


def array_id(values: NDArray[Any], orientation: int = 1) -> str:
    """Hash decoded values (H, W) or (H, W, C): equal for equal images, however they are stored."""
    values = values[..., None] if values.ndim == 2 else values
    head = f"{values.shape} {values.dtype.kind}{values.dtype.itemsize} {orientation if orientation in UPRIGHT else 1} "
    return hashlib.sha256(
        head.encode() + values.astype(values.dtype.newbyteorder("="), copy=False).tobytes()
    ).hexdigest()[:32]


def transpose(pixels: NDArray[Any], method: Image.Transpose) -> NDArray[Any]:
    """Apply one of Pillow's transpositions to any number of channels."""
    turns = {
        Image.Transpose.ROTATE_90: 1,
        Image.Transpose.ROTATE_180: 2,
        Image.Transpose.ROTATE_270: 3,
    }
    if method in turns:
        return np.rot90(pixels, turns[method])
    if method == Image.Transpose.FLIP_LEFT_RIGHT:
        return pixels[:, ::-1]
    if method == Image.Transpose.FLIP_TOP_BOTTOM:
        return pixels[::-1]
    swapped = pixels.swapaxes(0, 1)
    return swapped if method == Image.Transpose.TRANSPOSE else swapped[::-1, ::-1]


def resample(
    raw: RawImage, box: Box, target: tuple[int, int], form: PixelFormat, notes: list[str]
) -> Pixels:
    """Crop `raw` to `box` and scale it with antialiasing to `target`: (H, W, C).

    Black and white become the ends of the format's integers. Each channel is scaled by itself in
    floating point, with colours multiplied by alpha before.

    Raises:
        RejectedImage: if the channels do not fit the format, values are not finite, or nothing
            determines which values are black and white.
    """
    raw = _mark_alpha(raw, form, notes)
    if raw.array.dtype.kind == "f" and not (finite := np.isfinite(raw.array)).all():
        raise RejectedImage(
            f"{finite.size - np.count_nonzero(finite)} of its values are not finite (NaN or "
            "infinity)"
        )
    low, high = _black_and_white(raw, form.scale)
    if raw.kind == "integers" and form.bits == 8:
        notes.append("sixteen_bit_reduced")
    explicit = getattr(form.scale, raw.kind) is not None
    if explicit and ((raw.colours() < low) | (raw.colours() > high)).mean() > CUT_SHARE:
        notes.append("values_outside_range")
    opacity = _opacity(raw)
    size = (target[1], target[0])

    def scale(plane: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.LANCZOS, box=box))

    planes = []
    for band in range(raw.colours().shape[2]):
        plane = _from_black(raw.array[..., band], low)
        plane = plane.clip(0, high - low) if explicit else plane
        planes.append(scale(plane if opacity is None else plane * opacity))
    top = 2**form.bits - 1
    colours = np.stack(planes, axis=2) * (top / (high - low))
    alpha = None if opacity is None else scale(opacity) * top
    pixels = _arrange_channels(
        colours.clip(0, top), None if alpha is None else alpha.clip(0, top), form, notes
    )
    return np.rint(pixels).astype(np.uint8 if form.bits == 8 else np.uint16)


def _from_black(plane: NDArray[Any], low: float) -> NDArray[np.float32]:
    """Subtract black from values as float32.

    Integers of 32 bits and wider numbers are subtracted in float64 first, so that only the
    precision of the distance from black counts.
    """
    if plane.dtype.itemsize <= 2:
        plane = plane.astype(np.float32)
        return plane - np.float32(low) if low else plane
    with np.errstate(over="ignore"):
        return (plane - np.float64(low)).clip(-1e30, 1e30).astype(np.float32)


def _mark_alpha(raw: RawImage, form: PixelFormat, notes: list[str]) -> RawImage:
    """Mark the last channel as alpha, or drop it, as the settings say.

    Noted if 2 or 4 channels are kept and none of them is alpha.

    Raises:
        RejectedImage: if the channels do not fit the format.
    """
    bands = raw.array.shape[2]
    if form.alpha == "off" and raw.alpha:
        raw = raw._replace(
            alpha=False, array=raw.array if bands == form.channels else raw.array[..., :-1]
        )
    elif form.alpha == "on" and bands in (2, 4):
        raw = raw._replace(alpha=True)
    if bands == form.channels and bands in (2, 4) and not raw.alpha:
        notes.append("no_alpha")
    num_colours = raw.colours().shape[2]
    direct = num_colours == form.channels and not raw.alpha
    if not direct and (num_colours not in (1, 3) or form.channels > 4):
        hint = (
            "; data.alpha=on if the last is alpha" if bands in (2, 4) and form.channels <= 4 else ""
        )
        raise RejectedImage(f"{bands} channels, where data.channels is {form.channels}{hint}")
    return raw


def _black_and_white(raw: RawImage, scale: Scale) -> Range:
    """Return the values of black and white."""
    explicit: Range | None = getattr(scale, raw.kind)
    dtype = raw.array.dtype
    if explicit is not None:
        return explicit
    if dtype.kind == "u" and dtype.itemsize <= 2:
        return 0, raw.white or float(np.iinfo(dtype).max)
    colours = raw.colours()
    with np.errstate(invalid="ignore"):
        low, high = float(np.nanmin(colours)), float(np.nanmax(colours))
    if dtype.kind == "f" and not (low < 0 or high > 1):
        return 0, 1
    name = "floating-point" if dtype.kind == "f" else f"{8 * dtype.itemsize}-bit integer"
    raise RejectedImage(
        f"{name} values from {low:g} to {high:g}: set data.range=[BLACK, WHITE] to say which are "
        "black and white"
    )


def _opacity(raw: RawImage) -> NDArray[np.float32] | None:
    """Return alpha from 0 to 1; None if there is none."""
    if not raw.alpha:
        return None
    alpha = raw.array[..., -1]
    top = 1.0 if alpha.dtype.kind == "f" else raw.white or float(np.iinfo(alpha.dtype).max)
    return (alpha.astype(np.float32) / np.float32(top)).clip(0, 1)


def _arrange_channels(
    colours: NDArray[np.float32],
    alpha: NDArray[np.float32] | None,
    form: PixelFormat,
    notes: list[str],
) -> NDArray[np.float32]:
    """Arrange premultiplied colours and alpha, in [0, largest value], as the format's channels."""
    top = 2**form.bits - 1
    num_colours, channels = colours.shape[2], form.channels
    if num_colours == channels and alpha is None:
        return colours
    if alpha is not None and channels in (1, 3):
        if alpha.min() < top:
            notes.append("transparency_filled")
        background = np.array(form.background, np.float32) * (top / 255)
        background = (
            background
            if num_colours == 3
            else background[None]
            if channels == 3
            else background @ np.array(LUMA, np.float32)
        )
        colours = colours + (1 - alpha[..., None] / top) * background
        num_colours = colours.shape[2]
    plain = 3 if channels >= 3 else 1
    if num_colours == 3 and plain == 1:
        colours = (colours @ np.array(LUMA, np.float32))[..., None]
    elif num_colours == 1 and plain == 3:
        colours = np.repeat(colours, 3, axis=2)
    if channels in (1, 3):
        return colours
    # an image without alpha is opaque
    alpha = np.full(colours.shape[:2], top, np.float32) if alpha is None else alpha
    return np.concatenate([np.minimum(colours, alpha[..., None]), alpha[..., None]], axis=2)


def premultiply(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Multiply 8-bit colours (H, W, C) by the last channel, rounded."""
    alpha = pixels[..., -1:].astype(np.uint16)
    colours = (pixels[..., :-1] * alpha + np.uint16(127)) // np.uint16(255)
    return np.concatenate([colours.astype(np.uint8), pixels[..., -1:]], axis=2)
