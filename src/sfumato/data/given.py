"""Pictures and point clouds that a person hands in to steer a model, read as warily as any other file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfumato.data.decoding import PixelFormat, RejectedImage, decode, quiet
from sfumato.data.entry import File
from sfumato.data.points import RejectedPoints, read_points
from sfumato.errors import DataError

ONE_COLOUR = 8 / 255  # how far values of one colour may be apart after scaling


def given_picture(
    path: str | Path, *, channels: int, height: int, width: int, bits: int = 8, premultiplied: bool = False
) -> Tensor:
    """A picture file as (C, H, W) in [0, 1], scaled to cover height x width and cropped at the centre.

    Args:
        bits: of each value that is kept, 8 or 16.
        premultiplied: multiply the colours by alpha, the last channel.
    Raises:
        DataError: if it cannot be read.
    """
    pixels = _decoded(path, PixelFormat(shapes=((height, width),), channels=channels, bits=16 if bits == 16 else 8))
    if premultiplied:
        pixels[:-1] *= pixels[-1:]
    return pixels


def given_mask(path: str | Path, *, height: int, width: int) -> Tensor:
    """A mask file as (1, H, W) in [0, 1], scaled to cover height x width and cropped at the centre: 1 where it is white.

    Transparent ground is black. If what is visible has one colour, the mask is alpha alone: what is painted, in whatever colour.

    Raises:
        DataError: if it cannot be read.
    """
    shapes = ((height, width),)
    colours = _decoded(path, PixelFormat(shapes=shapes, channels=4))
    alpha = colours[3:]
    visible = colours[:3, alpha[0] >= 0.5]
    if alpha.min() < 1 and visible.numel() and float((visible.amax(1) - visible.amin(1)).max()) <= ONE_COLOUR:
        return alpha
    return _decoded(path, PixelFormat(shapes=shapes, channels=1, background=(0, 0, 0)))


def _decoded(path: str | Path, form: PixelFormat) -> Tensor:
    """(C, H, W) in [0, 1], a copy."""
    try:
        with quiet():
            pixels = decode(File(str(path)).read(), form).pixels
    except (RejectedImage, OSError) as error:
        raise DataError(
            f"cannot be used as a picture: {error}", where=str(path), mend="give a PNG, JPEG, WebP, BMP, GIF or TIFF"
        ) from None
    return torch.from_numpy(pixels.astype(np.float32)) / (2**form.bits - 1)


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
