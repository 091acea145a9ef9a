"""Masks of the loss: where in an image errors count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sfumato.networks.checks import resize_maps


def loss_weights(context: Mapping[str, Any], chosen: slice, *, like: Tensor) -> Tensor | None:
    """Return the weights (n, 1, h, w) of the elements of `like` (n, c, h, w); None without masks.

    Each is the mean of a mask over the element's area: 1 for white, 0 for black. An image without
    a mask, which is NaN, has the weight 1 everywhere.

    Args:
        context: of a group of images; its "loss_mask" is (N, 1, H, W) from -1 to 1.
        chosen: those of the group that are in `like`.
    """
    mask: Tensor | None = context.get("loss_mask")
    if mask is None:
        return None
    weights = (mask[chosen].to(like).nan_to_num(1.0) + 1) / 2
    return resize_maps(weights, like)
