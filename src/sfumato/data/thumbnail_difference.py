"""How far two thumbnails differ, after they are laid over one another."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfumato.data.thumbnails import SIDE, Floats, means

# Measured on 20,000 CIFAR-10 images and 4,495 emoji with planted copies (docs/benchmarks.md).
EDGE_TOLERANCE = 0.2
ZOOMS, SHIFTS = (1.0, 1.035, 1.07, 1.105), (-1.0, -0.5, 0.0, 0.5, 1.0)
MARGIN = 2  # pixels of a thumbnail at its rim, which an alignment may have to make up
INSIDE, MIDDLE = slice(MARGIN, SIDE - MARGIN), slice(14, 18)
ROUNDING = 1e-4  # of a difference that is summed in another order
PLACES = np.arange(MARGIN, SIDE - MARGIN, 2)  # pixels that an alignment is judged by


def difference(first: NDArray[Any], second: NDArray[Any], rows: slice = INSIDE) -> Floats:
    """Return how far pairs of thumbnails (n, 32, 32, 3) differ where they differ most, out of 255.

    One gain and offset are fitted for all channels; what a small misplacement of edges explains is
    left out; the rest is averaged over 4 x 4 pixels, and the largest value is taken.

    Args:
        rows: of pixels that are looked at, a multiple of 4.
    """
    a, b = (centred(images) for images in (first, second))
    gain = np.sqrt((power(a) + 1) / (power(b) + 1)).clip(0.6, 1.6)
    around = slice(
        rows.start - 1, rows.stop + 1
    )  # which the ranges of the first and last rows need
    a, b = a[:, around], b[:, around] * gain
    excess = np.maximum(np.abs(a - b) - EDGE_TOLERANCE * np.maximum(_range(a), _range(b)), 0)
    result: Floats = means(excess[:, 1:-1, INSIDE], 4).max((1, 2, 3))
    return result


def differ_less(first: NDArray[Any], second: NDArray[Any], most: float) -> NDArray[np.bool_]:
    """Return which pairs of thumbnails differ by less than `most`; see `difference`.

    Most pairs that differ by more do so in the middle, at which all are looked first.
    """
    result = np.zeros(len(first), bool)
    left = np.flatnonzero(difference(first, second, MIDDLE) < most * (1 + ROUNDING))
    result[left] = difference(first[left], second[left]) < most
    return result


def centred(images: NDArray[Any]) -> Floats:
    """Return images (n, H, W, C) less the mean of each."""
    values = images.astype(np.float32)
    result: Floats = values - values.mean((1, 2, 3), keepdims=True)
    return result


def power(images: Floats) -> Floats:
    """Return the mean square of each image, (n, 1, 1, 1)."""
    result: Floats = np.square(images).mean((1, 2, 3), keepdims=True)
    return result


def _range(images: Floats) -> Floats:
    """Return the largest minus the smallest value in the 3 x 3 neighbourhood of each pixel."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")

    def over(function: np.ufunc) -> Floats:
        rows = function(function(padded[:, :-2], padded[:, 1:-1]), padded[:, 2:])
        result: Floats = function(function(rows[:, :, :-2], rows[:, :, 1:-1]), rows[:, :, 2:])
        return result

    return over(np.maximum) - over(np.minimum)


def align(fixed: NDArray[np.uint8], moving: NDArray[np.uint8]) -> Floats:
    """Enlarge and shift `moving` (n, 32, 32, 3) so that it lies best over `fixed`.

    The fit is judged by every second pixel.
    """
    n, side = len(fixed), len(PLACES)
    target = centred(_gray(fixed)[:, PLACES][:, :, PLACES]).reshape(n, -1, 1)
    gray = _gray(moving)[..., 0]
    best, choice = np.full(n, np.inf, np.float32), np.zeros((n, 3), np.int64)
    for zoom, coarse in enumerate(_resampling(PLACES)):
        every = coarse.reshape(-1, SIDE)  # of all shifts
        moved = np.matmul(np.matmul(every, gray), every.T)
        moved = moved.reshape(n, len(SHIFTS), side, len(SHIFTS), side).transpose(0, 1, 3, 2, 4)
        moved = moved.reshape(n, -1, side * side)
        # the mean square of moved - its mean - target, but for what does not depend on the shift
        distance = moved.var(2) - 2 * np.matmul(moved, target)[:, :, 0] / (side * side)
        nearest = distance.argmin(1)
        value = distance[np.arange(n), nearest]
        nearer = value < best
        best[nearer] = value[nearer]
        dy, dx = np.divmod(nearest[nearer], len(SHIFTS))
        choice[nearer] = np.stack([np.full(len(dy), zoom), dy, dx], axis=1)
    whole = _resampling(np.arange(SIDE))
    rows, columns = whole[choice[:, 0], choice[:, 1]], whole[choice[:, 0], choice[:, 2]]
    lines = np.matmul(rows, moving.reshape(n, SIDE, -1).astype(np.float32))
    result: Floats = np.matmul(columns[:, None], lines.reshape(n, SIDE, SIDE, -1))
    return result


def _resampling(places: NDArray[np.int64]) -> Floats:
    """Return, for each zoom and shift, the matrix that resamples an axis linearly at some places:
    (zooms, shifts, places, 32).

    The axis is enlarged about the centre, then shifted by pixels.
    """
    centre, rows = (SIDE - 1) / 2, np.arange(len(places))
    result = np.zeros((len(ZOOMS), len(SHIFTS), len(places), SIDE), np.float32)
    for (i, zoom), (j, shift) in product(enumerate(ZOOMS), enumerate(SHIFTS)):
        place = ((places - centre) / zoom + centre + shift).clip(0, SIDE - 1)
        low = np.minimum(place.astype(int), SIDE - 2)
        share = (place - low).astype(np.float32)
        result[i, j, rows, low] = 1 - share
        result[i, j, rows, low + 1] += share
    return result


def _gray(images: NDArray[np.uint8]) -> Floats:
    result: Floats = images.mean(3, keepdims=True, dtype=np.float32)
    return result
