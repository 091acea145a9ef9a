"""What resizing and cropping did to an image."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.data.pixel_format import covering_box


def resizing(size: Sequence[int], target: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the height and width that an image lost, and what was cut off at the top and left.

    Both losses are negative where the image was enlarged. What augmentation cuts off is not
    counted.

    Args:
        size: (width, height) before, in pixels.
        target: (height, width) after; what is cut off is counted in its pixels.
    """
    (width, height), (rows, columns) = size, target
    left, top, right, _ = covering_box(width, height, target)
    scale = columns / (right - left)
    return height - rows, width - columns, round(scale * top), round(scale * left)
