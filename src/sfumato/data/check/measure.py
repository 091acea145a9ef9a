"""Numbers about one picture, taken at no more than 128 pixels along its shorter side."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfumato.data.decoding import RejectedImage, decode, fitted
from sfumato.data.duplicates import thumbnail
from sfumato.data.entry import Entry

SIDE = 128
CELLS, ORIENTATIONS = 4, 8


class Measurement(NamedTuple):
    """One readable picture.

    Attributes:
        id: hash of the content.
        size: (width, height) upright.
        notes: what decoding had to do.
        dark_end, bright_end: 99th and 5th percentile of perceived brightness, from 0 to 1.
        white: share of pixels that are nearly white.
        contrast: standard deviation of the values over the picture, of 255; the largest of the channels.
        sharpness: 98th percentile of the Laplacian over the range of values; about 1 for line art, 0.7 for photographs, below 0.25
            for blurred ones.
        colourful: mean difference of the channels, of 255; 0 for gray.
        thumbnail: (32, 32, 3).
        gradients: histogram of edge directions in 4 x 4 cells, (128,).
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


def measure(entry: Entry) -> Measurement | str:
    """The numbers of a picture, or why it cannot be read."""
    try:
        data = entry.image.read()
        decoded = decode(data, fitted(data, SIDE), identify=True)
    except (RejectedImage, OSError) as error:
        return str(error)
    pixels = decoded.pixels.transpose(1, 2, 0).astype(np.float32)
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
        thumbnail=thumbnail(decoded.pixels),
        gradients=_gradients(gray),
    )


def sharpness(gray: NDArray[np.float32]) -> float:
    """98th percentile of |Laplacian| over the 2-98 % range of values; pictures of under 3 x 3 pixels are sharp."""
    if min(gray.shape) < 3:
        return 1.0
    inner = gray[1:-1, 1:-1]
    laplacian = np.abs(4 * inner - gray[:-2, 1:-1] - gray[2:, 1:-1] - gray[1:-1, :-2] - gray[1:-1, 2:])
    low, high = np.quantile(gray, [0.02, 0.98])
    return float(np.quantile(laplacian, 0.98) / max(high - low, 8.0))


def _gradients(gray: NDArray[np.float32]) -> NDArray[np.float16]:
    """Histogram of oriented gradients of the picture at 32 x 32, of length 1 (Dalal and Triggs 2005)."""
    small = np.asarray(Image.fromarray(gray).resize((34, 34), Image.Resampling.BILINEAR))
    dx, dy = small[1:-1, 2:] - small[1:-1, :-2], small[2:, 1:-1] - small[:-2, 1:-1]
    sector = ((np.arctan2(dy, dx) % np.pi) * (ORIENTATIONS / np.pi)).astype(int).clip(0, ORIENTATIONS - 1)
    cell = np.arange(32) // (32 // CELLS)
    place = (cell[:, None] * CELLS + cell[None, :]) * ORIENTATIONS + sector
    histogram = np.bincount(place.ravel(), np.hypot(dx, dy).ravel(), CELLS * CELLS * ORIENTATIONS)
    return (histogram / (np.linalg.norm(histogram) + 1e-6)).astype(np.float16)
