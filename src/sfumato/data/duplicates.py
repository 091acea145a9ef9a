"""Which pictures are the same, or nearly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 16
NEIGHBOURS, DIMENSIONS = 8, 12


def thumbnail(pixels: NDArray) -> NDArray[np.uint8]:
    """Pixels (C, H, W) of 8 or 16 bits -> RGB (16, 16, 3), by which near-duplicates are found."""
    if pixels.dtype != np.uint8:
        pixels = (pixels >> 8).astype(np.uint8)
    colours = pixels[:3] if pixels.shape[0] >= 3 else np.repeat(pixels[:1], 3, axis=0)
    image = Image.fromarray(np.ascontiguousarray(colours.transpose(1, 2, 0)))
    return np.asarray(
        image.resize((SIDE, SIDE), Image.Resampling.BOX if min(image.size) >= SIDE else Image.Resampling.BILINEAR)
    )


def clusters(ids: Sequence[str], thumbnails: NDArray[np.uint8]) -> NDArray[np.int64]:
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(i, len(numbers)) for i in ids], np.int64)
