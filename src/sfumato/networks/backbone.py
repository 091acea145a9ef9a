"""The network of a diffusion model, as trainers, presets and samplers see it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from sfumato.condition import NO_CONTEXT, Condition, ContextSizes
from sfumato.config import Extensible
from sfumato.nn.accelerable import Accelerable


class NetworkConfig(Extensible, ABC):
    """Size and shape of a network. A frozen dataclass derived from it defines a kind of network."""

    @property
    def origin(self) -> str:
        """Folder of the weights that training starts from; "" for random ones."""
        return ""

    @property
    def frozen_in(self) -> str:
        """What weights are stored in that cannot be trained; "" if all can be."""
        return ""

    @abstractmethod
    def build(self, *, image_channels: int, context: ContextSizes = NO_CONTEXT) -> Backbone:
        """Build the untrained network.

        Args:
            image_channels: channels of x and of the prediction.
            context: sizes of the condition's slots.
        """

    def from_scratch(self) -> NetworkConfig:
        """Return the same network with random weights."""
        return self


class Backbone(Accelerable, ABC):
    """A network of any architecture. Subclasses define `forward`; all other members have defaults.

    A subclass may wrap any other `nn.Module`: hold it as an attribute and call it in `forward`.

    Attributes:
        image_channels: channels of x and of the prediction.
        context: sizes of the condition's slots; an absent slot has size 0.
        multiple: sides of x that are not multiples of this are padded inside, which costs time.
        hidden_channels: channels of the feature map that passes through `probe`; 0 if the network
            passes none.
        probe: an identity that `forward` passes a hidden feature map (B, hidden_channels, h, w)
            through. Auxiliary losses read the map there.
        embedded_guidance: guidance scale that the network itself is told, as distilled ones are;
            None for a network that is told none.
    """

    hidden_channels: int = 0
    embedded_guidance: float | None = None

    def __init__(self, *, image_channels: int, context: ContextSizes = NO_CONTEXT) -> None:
        super().__init__()
        self.image_channels, self.context = image_channels, context
        self.probe = nn.Identity()

    @abstractmethod
    def forward(self, x: Tensor, noise_input: Tensor, condition: Condition) -> Tensor:
        """Predict the parameterization's target.

        Args:
            x: noisy images (B, C, H, W), of about unit variance.
            noise_input: noise level of each image (B,), from 0 (data) to 1 (noise).
            condition: slots of the sizes `context`.

        Returns:
            A tensor of x's shape.
        """

    @property
    def multiple(self) -> int:
        """The number that sides of x are padded to a multiple of; with 1, nothing is padded."""
        return 1

    @property
    def implementation(self) -> nn.Module:
        """The module whose names other programs know: the wrapped one, if this is a wrapper."""
        return self

    def input_layers(self) -> Sequence[nn.Module]:
        """Return the layers whose input has a fixed size, however wide the network is.

        Optimizers do not scale their learning rate with width.
        """
        return ()

    def output_layers(self) -> Sequence[nn.Module]:
        """Return the layers whose output has a fixed size, however wide the network is.

        Muon leaves them to AdamW.
        """
        return ()
