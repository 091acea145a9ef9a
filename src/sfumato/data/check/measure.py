"""Measurements of single images, taken at no more than 128 pixels along the shorter side."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfumato.data.decoding import PixelFormat, Pixels, RejectedImage, decode, fit_within
from sfumato.data.listing import Entry
from sfumato.data.thumbnails import thumbnail

SIDE = 128
CELLS, ORIENTATIONS = 4, 8


class Measurement(NamedTuple):
    """The measurements of one readable image.

    Attributes:
        id: hash of the content.
        size: (width, height) upright.
        notes: what decoding had to do.
        dark_end, bright_end: 99th and 5th percentile of perceived brightness, from 0 to 1.
        white: share of pixels that are nearly white.
        contrast: standard deviation of the values over the image, of 255; the largest of the
            channels.
        sharpness: 98th percentile of the Laplacian over the range of values; about 1 for line art,
            0.7 for photographs, below 0.25
            for blurred ones.
        colourful: mean difference of the channels, of 255; 0 for gray.
        thumbnail: (32, 32, 3).
        gradients: histogram of edge directions in 4 x 4 cells, (128,).
        frames: images that the file holds, of which the first is measured.
    """

    id: str
    size: tuple[int, int]
    notes: tuple[str, ...]
    dark_end: float
    bright_end: float
    white: float
    contrast: float
    sharpness: float
    colourful: float
    thumbnail: NDArray[np.uint8]
    gradients: NDArray[np.float16]
    frames: int = 1


def to_display_rgb(pixels: Pixels, form: PixelFormat, *, alpha: bool) -> NDArray[np.float32]:
    """Convert pixels (C, H, W) to what a person sees: RGB from 0 to 255, (H, W, 3).

    Transparent images lie on the background; of many channels, the first three are used.
    """
    values = pixels.transpose(1, 2, 0).astype(np.float32) / np.float32(
        1 if pixels.dtype == np.uint8 else 257
    )
    if form.channels in (2, 4) and alpha:
        values = values[..., :-1] + (1 - values[..., -1:] / np.float32(255)) * np.array(
            form.background, np.float32
        )
    return values[..., :3] if values.shape[2] >= 3 else np.repeat(values[..., :1], 3, axis=2)


def measure(entry: Entry, form: PixelFormat | None = None) -> Measurement | str:
    """Measure an image as training sees it, in RGB by default; return why if it cannot be read."""
    try:
        data = entry.image.read()
        form = fit_within(data, SIDE, form)
        decoded = decode(data, form, identify=True)
    except (RejectedImage, OSError) as error:
        return str(error)
    pixels = to_display_rgb(decoded.pixels, form, alpha="no_alpha" not in decoded.notes)
    brightness = np.sqrt(np.square(pixels) @ np.array([0.241, 0.691, 0.068], np.float32)) / 255
    bright_end, dark_end = np.quantile(brightness, [0.05, 0.99])
    gray = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    return Measurement(
        id=decoded.id,
        size=decoded.size,
        notes=tuple(note for note in decoded.notes if note != "upscaled"),
        dark_end=float(dark_end),
        bright_end=float(bright_end),
        white=float((brightness > 0.97).mean()),
        contrast=float(pixels.std((0, 1)).max()),
        sharpness=sharpness(gray),
        colourful=float(np.ptp(pixels, axis=2).mean()),
        thumbnail=thumbnail(np.rint(pixels).clip(0, 255).astype(np.uint8).transpose(2, 0, 1)),
        gradients=_gradients(gray),
        frames=decoded.frames,
    )


def sharpness(gray: NDArray[np.float32]) -> float:
    """Return the 98th percentile of |Laplacian| over the 2-98 % range of values.

    Images of under 3 x 3 pixels count as sharp.
    """
    if min(gray.shape) < 3:
        return 1.0
    inner = gray[1:-1, 1:-1]
    laplacian = np.abs(
        4 * inner - gray[:-2, 1:-1] - gray[2:, 1:-1] - gray[1:-1, :-2] - gray[1:-1, 2:]
    )
    low, high = np.quantile(gray, [0.02, 0.98])
    return float(np.quantile(laplacian, 0.98) / max(high - low, 8.0))


def _gradients(gray: NDArray[np.float32]) -> NDArray[np.float16]:
    """Return the histogram of oriented gradients of the image at 32 x 32, of norm 1.

    Source: Dalal and Triggs 2005.
    """
    small = np.asarray(Image.fromarray(gray).resize((34, 34), Image.Resampling.BILINEAR))
    dx, dy = small[1:-1, 2:] - small[1:-1, :-2], small[2:, 1:-1] - small[:-2, 1:-1]
    sector = (
        ((np.arctan2(dy, dx) % np.pi) * (ORIENTATIONS / np.pi))
        .astype(int)
        .clip(0, ORIENTATIONS - 1)
    )
    cell = np.arange(32) // (32 // CELLS)
    place = (cell[:, None] * CELLS + cell[None, :]) * ORIENTATIONS + sector
    histogram = np.bincount(place.ravel(), np.hypot(dx, dy).ravel(), CELLS * CELLS * ORIENTATIONS)
    return (histogram / (np.linalg.norm(histogram) + 1e-6)).astype(np.float16)
