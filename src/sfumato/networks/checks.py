"""Checks and preparation of inputs, shared by all networks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.condition import Condition, ContextSizes
from sfumato.errors import ShapeError


def check_inputs(
    x: Tensor, condition: Condition, *, image_channels: int, context: ContextSizes, where: str
) -> None:
    """Raise ShapeError unless x has the channels and the condition the slots of the network."""
    actual = ContextSizes.of(condition)
    # numbers, which a compiler may have symbols for
    sizes = (x.shape[1], actual.vector, actual.tokens, actual.spatial)
    if sizes != (image_channels, context.vector, context.tokens, context.spatial):
        raise ShapeError(
            f"got {x.shape[1]} image channels and context {actual}, but the network was built for {image_channels} "
            f"and {context}",
            where=where,
            hint="make the condition with the model's own conditioner",
        )


def pad_inputs(x: Tensor, condition: Condition, multiple: int) -> tuple[Tensor, Condition]:
    """Pad x (B, C, H, W) and the spatial maps with zeros, to multiples of `multiple`.

    Zeros are added below and at the right; if the sides of x fit, both are returned as they are.
    The network's output in the padding must be cropped.
    """
    below, right = -x.shape[2] % multiple, -x.shape[3] % multiple
    if not below and not right:
        return x, condition
    maps = condition.spatial
    if maps is not None and max(maps.shape[2:]) > 1:  # a 1 x 1 map is the same everywhere
        condition = replace(condition, spatial=F.pad(resize_maps(maps, x), (0, right, 0, below)))
    return F.pad(x, (0, right, 0, below)), condition


def unpadded(x: Tensor, height: int, width: int) -> Tensor:
    """Return x (B, C, height or more, width or more) without its padding, as a tensor of its own: a
    network that processes share must not return a view.
    """
    return x if x.shape[-2:] == (height, width) else x[..., :height, :width].clone()


def join_maps(x: Tensor, condition: Condition) -> Tensor:
    """Concatenate the condition's maps, if it has any, to x (B, C, H, W) along channels."""
    if condition.spatial is None:
        return x
    return torch.cat([x, resize_maps(condition.spatial, x)], dim=1)


def padding_overhead(height: int, width: int, multiple: int) -> float:
    """Return the extra work that padding to multiples causes, as a share of the unpadded work."""
    area = (height + -height % multiple) * (width + -width % multiple)
    return area / (height * width) - 1


def resize_maps(maps: Tensor, like: Tensor) -> Tensor:
    """Bring maps (B, C, h, w) to the height and width of `like`, by averaging or repeating."""
    return (
        maps
        if maps.shape[2:] == like.shape[2:]
        else F.adaptive_avg_pool2d(maps, (like.shape[2], like.shape[3]))
    )
