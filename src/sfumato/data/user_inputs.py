"""Images and point clouds that a user provides to steer a model, read as cautiously as any other
file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sfumato.data.decoding import PixelFormat, RejectedImage, Scale, decode, quiet
from sfumato.data.listing import File
from sfumato.data.points import RejectedPoints, read_points
from sfumato.errors import DataError

ONE_COLOUR = 8 / 255  # how far values of one colour may be apart after scaling


def load_user_image(
    path: str | Path,
    *,
    channels: int,
    height: int,
    width: int,
    bits: Literal[8, 16] = 8,
    alpha: Literal["none", "straight", "premultiplied"] = "straight",
    value_range: tuple[float, float] | None = None,
) -> Tensor:
    """Load an image file as (C, H, W) in [0, 1], in the values that a model uses.

    It is scaled to cover height x width, and cropped at the centre.

    Args:
        bits: of each value that is kept, 8 or 16.
        alpha: what the last of 2 or 4 channels is to the model.
        value_range: what black and white are to the model; None for the ends of the number's type.
            8-bit images keep 0 and 255 unless the range lies within those.
    Raises:
        DataError: if it cannot be read.
    """
    of_bytes = (
        value_range
        if value_range is not None and value_range[0] >= 0 and value_range[1] <= 255
        else None
    )
    form = PixelFormat(
        shapes=((height, width),),
        channels=channels,
        bits=bits,
        alpha="off" if alpha == "none" else "auto",
        scale=Scale(bytes=of_bytes, integers=value_range, floats=value_range),
    )
    pixels = _decode(path, form)
    return _unpremultiply(pixels) if alpha == "straight" and channels in (2, 4) else pixels


def _unpremultiply(pixels: Tensor) -> Tensor:
    """Divide the colours of premultiplied pixels (C, H, W) by alpha, the last channel.

    They are 0 where alpha is 0.
    """
    colours, alpha = pixels[:-1], pixels[-1:]
    return torch.cat(
        [torch.where(alpha > 0, colours / alpha.clamp(min=1e-6), 0.0).clamp(0, 1), alpha]
    )


def load_user_mask(path: str | Path, *, height: int, width: int) -> Tensor:
    """Load a mask file as (1, H, W) in [0, 1]: 1 where it is white.

    It is scaled to cover height x width, and cropped at the centre. A transparent background is
    black. If what is visible has one colour, the mask is alpha alone: whatever is painted, in any
    colour.

    Raises:
        DataError: if it cannot be read.
    """
    shapes = ((height, width),)
    colours = _unpremultiply(_decode(path, PixelFormat(shapes=shapes, channels=4)))
    alpha = colours[3:]
    visible = colours[:3, alpha[0] >= 0.5]
    if (
        alpha.min() < 1
        and visible.numel()
        and float((visible.amax(1) - visible.amin(1)).max()) <= ONE_COLOUR
    ):
        return alpha
    return _decode(path, PixelFormat(shapes=shapes, channels=1, background=(0, 0, 0)))


def _decode(path: str | Path, form: PixelFormat) -> Tensor:
    """Decode an image file to a new tensor (C, H, W) in [0, 1]."""
    try:
        with quiet():
            pixels = decode(File(str(path)).read(), form).pixels
    except (RejectedImage, OSError) as error:
        raise DataError(
            f"cannot be used as an image: {error}",
            where=str(path),
            hint="give a PNG, JPEG, WebP, BMP, GIF or TIFF",
        ) from None
    result: Tensor = torch.from_numpy(pixels.astype(np.float32)) / (2**form.bits - 1)
    return result


def load_user_points(path: str | Path) -> Tensor:
    """Load a point cloud file as (N, D), float32; one that is too large is thinned evenly.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        return torch.from_numpy(read_points(File(str(path)).read()))
    except (RejectedPoints, OSError) as error:
        raise DataError(
            f"cannot be used as a point cloud: {error}",
            where=str(path),
            hint="give a .npy, .ply, .xyz or .csv of numbers",
        ) from None
