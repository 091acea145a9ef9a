"""What a wider input layer needs from a network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import nn

from sfumato.condition import ContextSizes


@dataclass(frozen=True)
class InputLayer:
    """The layer through which a network reads noisy images.

    Attributes:
        layer: a convolution, or a linear layer whose input is tokens.
        pixels: number of pixels in a token that lists them one after the other, each with all its
            channels; 1 for a token that lists one channel after the other.
    """

    layer: nn.Linear | nn.Conv2d
    pixels: int = 1


class Widenable(nn.Module, ABC):
    """A network that can read maps beside noisy images, once its input layer is wide enough.

    Attributes:
        image_channels: channels of x.
        context: sizes of the condition's slots.
        reads_maps: whether the condition's maps are concatenated to x before the input layer.
    """

    image_channels: int
    context: ContextSizes
    reads_maps: bool = False

    @abstractmethod
    def input_layer(self) -> InputLayer:
        """Return the layer that reads x."""
