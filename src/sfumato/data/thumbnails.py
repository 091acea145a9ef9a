"""Small copies of images, by which those that are alike are found, and their signatures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfumato.data.parallel import ordered_map

SIDE = 32
FLAT = 6.0  # of 255: below this contrast, noise is not stretched
CHUNK = 4_000
# of the range of values: a set that uses less is stretched before its images are compared
DIM = 0.5
PERCENTILES = (0.1, 99.9)
Floats = NDArray[np.float32]


def thumbnail(pixels: NDArray[Any]) -> NDArray[Any]:
    """Scale pixels (C, H, W) of 8 or 16 bits to an RGB thumbnail (32, 32, 3) of the same dtype.

    Near-duplicates are found by these.
    """
    colours = pixels[:3] if pixels.shape[0] >= 3 else np.repeat(pixels[:1], 3, axis=0)
    if colours.dtype != np.uint8:
        planes = [
            Image.fromarray(plane.astype(np.float32)).resize(
                (SIDE, SIDE), Image.Resampling.BILINEAR
            )
            for plane in colours
        ]
        result: NDArray[Any] = np.rint(
            np.stack([np.asarray(plane) for plane in planes], axis=2)
        ).astype(colours.dtype)
        return result
    interleaved = np.ascontiguousarray(colours.transpose(1, 2, 0))
    if interleaved.shape[:2] == (SIDE, SIDE):
        return interleaved
    image = Image.fromarray(interleaved)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def stretch_contrast(
    thumbnails: NDArray[Any], limits: tuple[float, float] | None = None
) -> NDArray[np.uint8]:
    """Convert thumbnails (N, 32, 32, 3) to 8 bits.

    Args:
        limits: the values that become 0 and 255; by default those of `contrast_limits`.
    """
    low, high = limits or contrast_limits(thumbnails)
    if thumbnails.dtype == np.uint8 and (low, high) == (0, 255):
        return thumbnails
    values = np.rint((thumbnails.astype(np.float32) - low) * (255 / (high - low)))
    result: NDArray[np.uint8] = values.clip(0, 255).astype(np.uint8)
    return result


def contrast_limits(thumbnails: NDArray[Any]) -> tuple[float, float]:
    """Return the values that are black and white when the images of a set are compared.

    A set that uses little of its range, as dim microscopy and star fields do, is stretched to all
    of it; otherwise its images would seem flat and therefore alike.
    """
    most = float(np.iinfo(thumbnails.dtype).max)
    sample = thumbnails[:: max(1, len(thumbnails) // 1000)]
    low, high = np.percentile(sample, PERCENTILES) if len(sample) else (0.0, most)
    if high - low >= DIM * most or high <= low:
        return 0.0, most
    return float(low), float(high)


class Thumbnails(Protocol):
    """Thumbnails (N, 32, 32, 3) of 8 bits, in memory or read on access."""

    def __len__(self) -> int: ...
    def __getitem__(self, places: Any, /) -> NDArray[np.uint8]: ...


class Signatures(Protocol):
    """Signatures (N, 192) of thumbnails, in memory or computed on access."""

    def __getitem__(self, places: Any, /) -> Floats: ...


class StoredThumbnails:
    """Thumbnails that are read on access, with the contrast of the whole set stretched."""

    def __init__(
        self, read: Callable[[NDArray[np.int64]], NDArray[Any]], positions: NDArray[np.int64]
    ) -> None:
        self._read, self._positions = read, positions
        self._limits = contrast_limits(read(positions[:: max(1, len(positions) // 1000)]))

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, places: Any, /) -> NDArray[np.uint8]:
        return stretch_contrast(self._read(self._positions[places]), self._limits)


def signatures(thumbnails: Thumbnails) -> Floats:
    """Return 8 x 8 means of thumbnails (N, 32, 32, 3) without brightness and contrast: (N, 192)."""
    result = np.empty((len(thumbnails), 8 * 8 * 3), np.float32)

    def fill(begin: int) -> None:
        span = slice(begin, begin + CHUNK)
        result[span] = signatures_of(thumbnails[span])

    for _ in ordered_map(fill, range(0, len(thumbnails), CHUNK)):
        pass
    return result


def signatures_of(thumbnails: NDArray[np.uint8]) -> Floats:
    """Return the signatures of a few thumbnails, in one thread."""
    values = _cell_means(thumbnails).reshape(len(thumbnails), -1)
    values -= values.mean(1, keepdims=True)
    values /= np.maximum(values.std(1, keepdims=True), FLAT)
    return values


def _cell_means(thumbnails: NDArray[np.uint8]) -> Floats:
    """Return the means of 4 x 4 pixels of thumbnails (n, 32, 32, 3), exactly: (n, 8, 8, 3).

    Whole rows are added first, which is several times faster than `means`.
    """
    rows = thumbnails.reshape(len(thumbnails), 8, 4, SIDE * 3).sum(2, dtype=np.uint16)
    cells = rows.reshape(len(thumbnails), 8, 8, 4, 3)
    total = cells[..., 0, :] + cells[..., 1, :] + cells[..., 2, :] + cells[..., 3, :]
    result: Floats = total.astype(np.float32) / np.float32(16)
    return result


def means(images: NDArray[Any], size: int) -> Floats:
    """Return the means of size x size cells of images (n, H, W, C)."""
    n, height, width, channels = images.shape
    result: Floats = images.reshape(n, height // size, size, width // size, size, channels).mean(
        (2, 4), dtype=np.float32
    )
    return result
