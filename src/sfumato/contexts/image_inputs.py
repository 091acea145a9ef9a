"""Images and maps that come with a request: checked, resized and cycle."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.contexts.protocol import cycle
from sfumato.errors import ShapeError


def batch_of_images(value: Tensor, shape: tuple[int, int, int], num: int, name: str) -> Tensor:
    """Return (num, C, H, W) in [-1, 1] from one or several images in [0, 1], resized.

    Args:
        name: of the images, in errors.
    Raises:
        ShapeError: for other channels, or values outside [0, 1].
    """
    images = value[None] if value.ndim == 3 else value
    if (
        images.ndim != 4
        or images.shape[1] != shape[0]
        or not len(images)
        or min(images.shape[2:]) < 1
    ):
        raise ShapeError(
            f"a {name} of shape {tuple(value.shape)}",
            where="sample",
            hint=f"give ({shape[0]}, H, W), or several of them",
        )
    images = images.float().cpu()
    if not images.isfinite().all() or images.min() < 0 or images.max() > 1:
        raise ShapeError(
            f"a {name} with values outside [0, 1]",
            where="sample",
            hint="divide 8-bit pixels by 255",
        )
    if tuple(images.shape[2:]) != shape[1:]:
        images = F.interpolate(images, size=shape[1:], mode="bilinear", antialias=True).clamp(0, 1)
    return torch.stack(cycle(list(images * 2 - 1), num, name))
