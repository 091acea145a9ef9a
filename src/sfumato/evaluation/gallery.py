"""Sheets of conditions with the sample and the real image of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sfumato.conditioners import ConditioningInfo
from sfumato.contexts import CONTEXTS
from sfumato.data.choice import choose_evenly
from sfumato.observability.images import grid_image, to_display_rgb

COLUMNS = 10
TILE = 96  # pixels on screen that a small image is enlarged to


def gallery(
    context: Mapping[str, Any], samples: Tensor, real: Tensor, *, info: ConditioningInfo
) -> Image.Image:
    """Draw a sheet of up to ten conditions, evenly chosen, each in a column.

    From top to bottom, a column has the condition's words, its drawn parts, the sample and the real
    image.

    Args:
        context: the conditions of the samples, batched, by the names of contexts.
        samples, real: (n, C, H, W) in [-1, 1].
        info: what the model knows about its training set.
    """
    chosen = choose_evenly(np.arange(len(samples)), COLUMNS)
    factor = max(1, math.ceil(TILE / max(samples.shape[2:])))
    height, width = (factor * side for side in samples.shape[2:])
    drawn = {
        name: CONTEXTS[name].to_images(values, (height, width)) for name, values in context.items()
    }
    rows = {name: images[chosen] for name, images in drawn.items() if images is not None}
    rows |= {"sample": samples[chosen], "real": real[chosen]}
    tiles = [
        F.interpolate(
            to_display_rgb((row + 1) / 2, info.alpha), size=(height, width), mode="nearest"
        )
        for row in rows.values()
    ]
    return grid_image(
        torch.cat(tiles),
        columns=len(chosen),
        row_labels=list(rows),
        labels=_words(context, chosen.tolist(), info),
    )


def _words(context: Mapping[str, Any], chosen: list[int], info: ConditioningInfo) -> list[str]:
    """Return the words of each chosen condition; [] if no context has words."""
    said = [
        words
        for name, values in context.items()
        if (words := CONTEXTS[name].words(values, info)) is not None
    ]
    return [", ".join(filter(None, (words[i] for words in said))) for i in chosen] if said else []
