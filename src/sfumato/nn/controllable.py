"""What a control branch needs from a network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sfumato.condition import ContextSizes


class NoControl(nn.Module):
    """The control of a network without one: it adds nothing."""

    def forward(
        self, x: Tensor, noise_input: Tensor, spatial: Tensor | None, arguments: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return no arguments."""
        return {}


class Controllable(nn.Module, ABC):
    """A network whose features a control branch can add to.

    Attributes:
        context: sizes of the condition's slots.
        control: called with x, the noise level, the maps over the image (B, C, H, W) and the
            network's other arguments; returns further arguments.
    """

    context: ContextSizes
    control: nn.Module

    @abstractmethod
    def new_control(self, channels: int, factor: int) -> nn.Module:
        """Return a control whose output is zero: a copy of the network's first half.

        Args:
            channels: of the maps over the image.
            factor: side of an image over that of the network's input, whose grid maps are given
                on: (B, channels factor^2, H, W).
        """


def is_drawn(maps: Tensor, pixels: int) -> Tensor:
    """Return which images have a map of more than one value, (B,) bool.

    A blank sheet has not, nor has the absence of one.

    Args:
        maps: (B, C pixels, h, w), where each map has `pixels` channels.
    """
    values = maps.unflatten(1, (-1, pixels)).flatten(2)
    drawn: Tensor = (values != values[..., :1]).flatten(1).any(1)
    return drawn
