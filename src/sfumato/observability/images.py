"""Tensors as images that a person can look at, and PNG files of them."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor
from torch.nn import functional as F

from sfumato.storage.atomic import atomic_file

Alpha = Literal["none", "straight", "premultiplied"]
GAP, PAPER, INK = 2, (250, 250, 250), (30, 30, 30)
FONT = ImageFont.load_default(13)
SMALLEST_TILE = 56  # pixels on screen below which an image is hard to see
WORDY_TILE, WORDY = 96, 8  # the same where labels are longer than so many letters
# of the checkerboard under alpha: along the shorter side, and the darker gray
SQUARES, SHADE = 8, 0.8
POINT = 3  # pixels of a point's side


def to_display_rgb(images: Tensor, alpha: Alpha = "straight") -> Tensor:
    """Convert images (N, C, H, W) in [0, 1] to RGB (N, 3, H, W) for display.

    Images with alpha are composited over a checkerboard. Of more than three colours the first three
    are shown; two channels without alpha become red and green.

    Args:
        alpha: what the last of 2 or 4 channels is.
    """
    images = images.float().clamp(0, 1)
    channels, height, width = images.shape[1:]
    if channels in (2, 4) and alpha != "none":
        colours, opaque = images[:, :-1], images[:, -1:]
        colours = torch.minimum(colours, opaque) if alpha == "premultiplied" else colours * opaque
        images = (colours + (1 - opaque) * _checkerboard(height, width).to(images)).clamp(0, 1)
    elif channels == 2:
        images = torch.cat([images, torch.zeros_like(images[:, :1])], dim=1)
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]


def _checkerboard(height: int, width: int) -> Tensor:
    """Return light gray and white squares, (1, H, W) in [0, 1]."""
    side = max(1, min(height, width) // SQUARES)
    odd = (torch.arange(height)[:, None] // side + torch.arange(width) // side) % 2
    return 1 - (1 - SHADE) * odd[None].float()


def to_uint8(images: Tensor, alpha: Alpha = "straight") -> NDArray[np.uint8]:
    """Convert images (N, C, H, W) in [0, 1] to RGB (N, H, W, 3), as `to_display_rgb` does."""
    return (
        (to_display_rgb(images, alpha) * 255)
        .round()
        .to(torch.uint8)
        .permute(0, 2, 3, 1)
        .cpu()
        .numpy()
    )


def to_pil(image: Tensor) -> Image.Image:
    """Convert an image (C, H, W) in [0, 1] of 1 to 4 channels; gray and straight alpha are kept."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def draw_points(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Draw points (N, D) in [-1, 1] as dark dots on white, (1, H, W) in [0, 1].

    The view is along the third axis, with y upwards. Points with a NaN are left out.
    """
    height, width = size
    sheet = torch.ones(1, 1, height, width)
    visible = points[~points.isnan().any(1), :2].clamp(-1, 1)
    columns = ((visible[:, 0] + 1) / 2 * (width - 1)).round().long()
    rows = ((1 - visible[:, 1]) / 2 * (height - 1)).round().long()
    sheet[0, 0, rows, columns] = 0.0
    return -F.max_pool2d(-sheet, POINT, stride=1, padding=POINT // 2)[0]


def grid_image(
    images: Tensor,
    *,
    columns: int | None = None,
    row_labels: Sequence[str] = (),
    labels: Sequence[str] = (),
    inputs: Mapping[str, Tensor] | None = None,
    alpha: Alpha = "straight",
) -> Image.Image:
    """Arrange images (N, C, H, W) in [0, 1] in a grid; small ones are enlarged pixel by pixel.

    Args:
        row_labels: at the left of each row.
        labels: above each image, wrapped where they are long; give one per column for column
            headings.
        inputs: by name, images (C, H, W) in [0, 1] of the same size that fill a separate row above
            the others.
        alpha: what the last of 2 or 4 channels is.
    """
    tiles: list[NDArray[np.uint8] | None] = list(to_uint8(images, alpha))
    height, width = images.shape[2:]
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    if inputs:
        columns = max(columns, len(inputs))
        tiles = [
            *(to_uint8(one[None], alpha)[0] for one in inputs.values()),
            *[None] * (columns - len(inputs)),
            *tiles,
        ]
        labels = [*inputs, *[""] * (columns - len(inputs)), *labels]
    rows = math.ceil(len(tiles) / columns)
    smallest = WORDY_TILE if any(len(label) > WORDY for label in labels) else SMALLEST_TILE
    factor = max(1, math.ceil(smallest / max(height, width)))
    height, width = height * factor, width * factor
    left = 16 + 7 * max(map(len, row_labels)) if row_labels else GAP
    wrapped = [textwrap.fill(label, max(1, (width + GAP) // 7)) for label in labels]
    bands = [_band(wrapped[row * columns : (row + 1) * columns]) for row in range(rows)]
    tops = [sum(bands[: row + 1]) + row * (height + GAP) for row in range(rows)]
    sheet = Image.new("RGB", (left + columns * (width + GAP), GAP + tops[-1] + height + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, tile in enumerate(tiles):
        if tile is None:
            continue
        x, y = left + number % columns * (width + GAP), GAP + tops[number // columns]
        sheet.paste(Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST), (x, y))
        if number < len(wrapped):
            middle = y - bands[number // columns] / 2
            draw.text(
                (x + width / 2, middle),
                wrapped[number],
                fill=INK,
                anchor="mm",
                align="center",
                font=FONT,
            )
    for row, label in enumerate(row_labels):
        draw.text((6, GAP + tops[row] + height / 2), label, fill=INK, anchor="lm", font=FONT)
    return sheet


def _band(labels: Sequence[str]) -> int:
    """Return the height in pixels of the labels above a row of images."""
    return 4 + 16 * max(label.count("\n") + 1 for label in labels) if any(labels) else 0


def save_png(image: Image.Image, path: Path, settings: dict[str, Any] | None = None) -> Path:
    """Write a PNG atomically, with the settings that it was made with in a text field."""
    text = PngImagePlugin.PngInfo()
    if settings is not None:
        text.add_text("sfumato", json.dumps(settings))
    with atomic_file(path) as file:
        image.save(file, "PNG", pnginfo=text)
    return path
