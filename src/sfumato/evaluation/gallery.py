"""What was asked for, what came, and the real picture, one above the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sfumato.evaluation.adherence import spread
from sfumato.observability.pictures import grid_image

COLUMNS = 10
TILE = 96  # pixels on screen that a small picture is enlarged to
POINT = 3  # pixels on screen of a point's side


def gallery(context: Mapping[str, Any], samples: Tensor, real: Tensor, *, categories: Sequence[str] = ()) -> Image.Image:
    """A sheet of up to ten conditions, evenly chosen: above each its words, then its drawn parts, the sample and the real picture.

    Args:
        context: what samples were asked for, batched: text, category, doodle, points, reference, image.
        samples, real: (n, C, H, W) in [-1, 1].
        categories: names of the numbers in context["category"].
    """
    chosen = spread(np.arange(len(samples)), COLUMNS)
    factor = max(1, math.ceil(TILE / max(samples.shape[2:])))
    height, width = (factor * side for side in samples.shape[2:])
    rows = {name: _drawn(name, context[name][chosen], (height, width)) for name in _DRAWN if name in context}
    rows |= {"sample": samples[chosen], "real": real[chosen]}
    tiles = [F.interpolate(_rgb(row), size=(height, width), mode="nearest") for row in rows.values()]
    return grid_image(
        (torch.cat(tiles) + 1) / 2,
        columns=len(chosen),
        row_labels=list(rows),
        labels=_words(context, chosen.tolist(), categories),
    )


_DRAWN = ("doodle", "points", "reference", "image")


def _drawn(name: str, values: Tensor, size: tuple[int, int]) -> Tensor:
    """The condition as a picture (n, C, h, w) in [-1, 1]; what it does not know is gray."""
    return _scattered(values, size) if name == "points" else values.nan_to_num(0.0)


def _scattered(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Points (n, N, D) in [-1, 1] with y upwards, seen along the third axis, as dark dots on white."""
    height, width = size
    sheets = torch.ones(len(points), 1, height, width)
    for sheet, cloud in zip(sheets, points, strict=True):
        known = cloud[~cloud.isnan().any(1), :2].clamp(-1, 1)
        columns = ((known[:, 0] + 1) / 2 * (width - 1)).round().long()
        rows = ((1 - known[:, 1]) / 2 * (height - 1)).round().long()
        sheet[0, rows, columns] = -1.0
    return -F.max_pool2d(-sheets, POINT, stride=1, padding=POINT // 2)


def _rgb(pictures: Tensor) -> Tensor:
    return pictures[:, :3] if pictures.shape[1] >= 3 else pictures[:, :1].expand(-1, 3, -1, -1)


def _words(context: Mapping[str, Any], chosen: list[int], categories: Sequence[str]) -> list[str]:
    """The words of each chosen condition, or none at all."""
    texts = [context["text"][i] for i in chosen] if "text" in context else []
    numbers = [int(context["category"][i]) for i in chosen] if "category" in context else []
    names = [categories[number] if 0 <= number < len(categories) else "" for number in numbers]
    return [", ".join(filter(None, parts)) for parts in zip(texts, names, strict=True)] if texts and names else texts or names
