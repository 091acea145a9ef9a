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
from sfumato.observability.images import Alpha, grid_image, scattered, shown

COLUMNS = 10
TILE = 96  # pixels on screen that a small picture is enlarged to


def gallery(
    context: Mapping[str, Any], samples: Tensor, real: Tensor, *, categories: Sequence[str] = (), alpha: Alpha = "straight"
) -> Image.Image:
    """A sheet of up to ten conditions, evenly chosen: above each its words, then its drawn parts, the sample and the real picture.

    Args:
        context: what samples were asked for, batched: text, category, doodle, points, reference, image.
        samples, real: (n, C, H, W) in [-1, 1].
        categories: names of the numbers in context["category"].
        alpha: what the last of 2 or 4 channels is.
    """
    chosen = spread(np.arange(len(samples)), COLUMNS)
    factor = max(1, math.ceil(TILE / max(samples.shape[2:])))
    height, width = (factor * side for side in samples.shape[2:])
    rows = {name: _drawn(name, context[name][chosen], (height, width)) for name in _DRAWN if name in context}
    rows |= {"sample": samples[chosen], "real": real[chosen]}
    tiles = [F.interpolate(shown((row + 1) / 2, alpha), size=(height, width), mode="nearest") for row in rows.values()]
    return grid_image(
        torch.cat(tiles),
        columns=len(chosen),
        row_labels=list(rows),
        labels=_words(context, chosen.tolist(), categories),
    )


_DRAWN = ("doodle", "points", "reference", "image")


def _drawn(name: str, values: Tensor, size: tuple[int, int]) -> Tensor:
    """The condition as a picture (n, C, h, w) in [-1, 1]; what it does not know is gray."""
    if name == "points":
        return torch.stack([scattered(cloud, size) for cloud in values]) * 2 - 1
    return values.nan_to_num(0.0)


def _words(context: Mapping[str, Any], chosen: list[int], categories: Sequence[str]) -> list[str]:
    """The words of each chosen condition, or none at all."""
    texts = [context["text"][i] for i in chosen] if "text" in context else []
    numbers = [int(context["category"][i]) for i in chosen] if "category" in context else []
    names = [categories[number] if 0 <= number < len(categories) else "" for number in numbers]
    return [", ".join(filter(None, parts)) for parts in zip(texts, names, strict=True)] if texts and names else texts or names
