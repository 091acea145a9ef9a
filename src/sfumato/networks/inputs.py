"""What every network does with what it is given."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from sfumato.condition import Condition, ContextSizes
from sfumato.errors import ShapeError


def require_built_for(x: Tensor, condition: Condition, *, image_channels: int, context: ContextSizes, where: str) -> None:
    """Raise ShapeError unless x has the channels, and the condition the slots, that a network was built for."""
    given = ContextSizes.of(condition)
    sizes = (x.shape[1], given.vector, given.tokens, given.spatial)  # numbers, which a compiler may have symbols for
    if sizes != (image_channels, context.vector, context.tokens, context.spatial):
        raise ShapeError(
            f"got {x.shape[1]} image channels and context {given}, built for {image_channels} and {context}",
            where=where,
            mend="make the condition with the model's own conditioner",
        )


def resized(maps: Tensor, like: Tensor) -> Tensor:
    """Maps (B, C, h, w) at the height and width of feature maps: averaged, or repeated."""
    return maps if maps.shape[2:] == like.shape[2:] else F.adaptive_avg_pool2d(maps, (like.shape[2], like.shape[3]))
