"""Tensors as PNG files that a person can look at."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

GAP, PAPER, INK = 2, (250, 250, 250), (30, 30, 30)
FONT = ImageFont.load_default(13)
SMALLEST_TILE = 56  # pixels on screen below which a picture is hard to see
WORDY_TILE, WORDY = 96, 8  # the same where labels are longer than so many letters


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """(N, C, H, W) in [0, 1], C of 1 or 3 -> (N, H, W, 3)."""
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return np.repeat(pixels, 3, axis=3) if pixels.shape[3] == 1 else pixels[..., :3]


def picture(image: Tensor) -> Image.Image:
    """One picture (C, H, W) in [0, 1] at its own size; gray stays gray."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels[..., :3])


def grid_image(
    images: Tensor,
    *,
    columns: int | None = None,
    row_labels: Sequence[str] = (),
    labels: Sequence[str] = (),
) -> Image.Image:
    """Pictures (N, C, H, W) in [0, 1] side by side, small ones enlarged pixel by pixel.

    Args:
        row_labels: at the left of each row.
        labels: above each picture, over several lines where they are long; as many as `columns` for a heading of the columns.
    """
    tiles = to_uint8(images)
    count, height, width, _ = tiles.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
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
        x, y = left + number % columns * (width + GAP), GAP + tops[number // columns]
        sheet.paste(Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST), (x, y))
        if number < len(wrapped):
            middle = y - bands[number // columns] / 2
            draw.text((x + width / 2, middle), wrapped[number], fill=INK, anchor="mm", align="center", font=FONT)
    for row, label in enumerate(row_labels):
        draw.text((6, GAP + tops[row] + height / 2), label, fill=INK, anchor="lm", font=FONT)
    return sheet


def _band(labels: Sequence[str]) -> int:
    """Height of the labels above a row of pictures."""
    return 4 + 16 * max(label.count("\n") + 1 for label in labels) if any(labels) else 0


def save_png(image: Image.Image, path: Path, settings: dict[str, Any] | None = None) -> Path:
    """Write a PNG whose text carries the settings it was made with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = PngImagePlugin.PngInfo()
    if settings is not None:
        text.add_text("sfumato", json.dumps(settings))
    image.save(path, pnginfo=text)
    return path
