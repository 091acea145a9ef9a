"""Pictures and point clouds that a person hands in to steer a model, read as warily as any other file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sfumato.data.decoding import PixelFormat, RejectedImage, decode, quiet
from sfumato.data.entry import File
from sfumato.data.points import RejectedPoints, read_points
from sfumato.errors import DataError


def given_picture(path: str | Path, *, channels: int, height: int, width: int) -> Tensor:
    """A picture file as (C, H, W) in [0, 1], scaled to cover height x width and cropped at the centre.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        with quiet():
            pixels = decode(File(str(path)).read(), PixelFormat(shapes=((height, width),), channels=channels)).pixels
    except (RejectedImage, OSError) as error:
        raise DataError(
            f"cannot be used as a picture: {error}", where=str(path), mend="give a PNG, JPEG, WebP, BMP, GIF or TIFF"
        ) from None
    return torch.from_numpy(pixels).float() / 255


def given_points(path: str | Path) -> Tensor:
    """A point cloud file as (N, D), float32; one that is too large is thinned evenly.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        return torch.from_numpy(read_points(File(str(path)).read()))
    except (RejectedPoints, OSError) as error:
        raise DataError(
            f"cannot be used as a point cloud: {error}", where=str(path), mend="give a .npy, .ply, .xyz or .csv of numbers"
        ) from None
