"""Control by a wider input layer: the layer that reads the noisy image reads maps over it too, such
as a doodle, by weights that begin at zero; a LoRA lets the frozen rest of the network follow them.

Only images that come with something drawn are steered. For all others the network computes what its
base does, to the last bit.

Source: the wider input layer of image conditions: Brooks et al. 2023 (arXiv:2211.09800), sec. 3.2;
    together with a LoRA: Black Forest Labs 2024, FLUX.1 Canny and Depth, "-lora".
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.adapters.adapter import AdaptableConditioner, Addition, without_adapters
from sfumato.adapters.lora import LoRA, LowRank
from sfumato.condition import Condition, ContextSizes
from sfumato.errors import ConfigError
from sfumato.nn.controllable import is_drawn
from sfumato.nn.frozen_layers import FrozenConv2d, FrozenLinear
from sfumato.nn.widenable import InputLayer, Widenable


class Widened(Addition):
    """The part that an input layer of any type gets.

    Attributes:
        control: weights of the maps, as those of the layer's own inputs; zero at the start.
        pixels: see `InputLayer`.
    """

    control: nn.Parameter
    pixels: int


class WidenedLinear(nn.Linear, Widened):
    """A linear layer that reads more channels of each token: control (out, map inputs)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b, plus control times the maps that follow the pixels' own channels."""
        pixels = x.unflatten(-1, (self.pixels, -1))
        channels = self.in_features // self.pixels
        # contiguous, as the base reads it: products then round alike
        base = super().forward(pixels[..., :channels].flatten(-2).contiguous())
        if not self.adapted:
            return base
        return base + F.linear(pixels[..., channels:].flatten(-2), self.control)


class WidenedConv2d(nn.Conv2d, Widened):
    """A convolution that reads more channels: control (out, map channels, k, k)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of the first channels, plus that of the maps by control."""
        own, maps = x[:, : self.in_channels], x[:, self.in_channels :]
        # in the layout that the base reads: products then round alike
        last = x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        base = super().forward(own.contiguous(memory_format=layout))
        if not self.adapted:
            return base
        steered: Tensor = base + self._conv_forward(maps, self.control, None)
        return steered


class WidenedFrozenLinear(WidenedLinear, FrozenLinear):
    """The same for a weight that is stored in fewer bits; control is float32."""


class WidenedFrozenConv2d(WidenedConv2d, FrozenConv2d):
    """The same for a weight that is stored in fewer bits; control is float32."""


# the class of an input layer after it was widened, by that before
WIDENED: dict[type[nn.Module], type[Widened]] = {
    nn.Linear: WidenedLinear,
    nn.Conv2d: WidenedConv2d,
    FrozenLinear: WidenedFrozenLinear,
    FrozenConv2d: WidenedFrozenConv2d,
}


class Controlled(nn.Module):
    """What a network becomes: where nothing is drawn, it computes what its base does.

    Attributes:
        pixels: number of a map's channels, (side of an image over that of the network's input)^2.
    """

    pixels: int

    def forward(self, x: Tensor, noise_input: Tensor, condition: Condition) -> Tensor:
        """Predict the target of each image, by the base for images without a drawing."""
        assert condition.spatial is not None
        steered = is_drawn(condition.spatial, self.pixels)
        if bool(steered.all()):
            return self._predict(x, noise_input, condition)
        differentiable = torch.is_grad_enabled() and x.requires_grad
        with without_adapters(self), torch.set_grad_enabled(differentiable):
            base = self._predict(x, noise_input, condition)
        # training needs the others' gradients, be they zero
        if not (bool(steered.any()) or torch.is_grad_enabled()):
            return base
        return torch.where(
            steered[:, None, None, None], self._predict(x, noise_input, condition), base
        )

    def _predict(self, x: Tensor, noise_input: Tensor, condition: Condition) -> Tensor:
        result: Tensor = super().forward(x, noise_input, condition)
        return result


def added_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return what control adds to a network, by name."""
    kinds: dict[type[Addition], tuple[str, ...]] = {
        Widened: ("control",),
        LowRank: ("lora_A", "lora_B"),
    }
    return {
        f"{prefix}.{name}": part.get_parameter(name)
        for prefix, part in network.named_modules()
        for kind, names in kinds.items()
        if isinstance(part, kind)
        for name in names
    }


@functools.cache
def controlled(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a network of this class, once it is controlled."""
    return type(kind.__name__, (Controlled, kind), {"__module__": kind.__module__})


@dataclass(frozen=True, kw_only=True)
class ControlLoRA(LoRA):
    """Control by a wider input layer and a LoRA, steered by what lies over the image: doodles
    unless another context is configured. Without one, images are those of the base.

    Attributes:
        rank: of the LoRA.
        alpha: the LoRA is multiplied by alpha / rank; null for alpha = rank.
        layers: regular expressions, found in the names of the layers that get a LoRA; all linear
            layers by default.
        convolutions: whether convolutions get one too.
        text_encoders: must be off, since texts are read as by the base.
    """

    kind: ClassVar[str] = "control-lora"
    keeps_known: ClassVar[bool] = True
    # guidance acts on the rest alone; images without a doodle would teach nothing
    contexts: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "doodle": {"guided": False, "dropout": 0.0}
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_encoders:
            raise ConfigError(
                "text encoders cannot be trained by control-lora: images without a doodle would "
                "not be those of the base",
                where="adapter.text_encoders",
                hint="leave it out, or use adapter.kind=lora",
            )

    @property
    def described(self) -> str:
        """What is trained, in words."""
        return f"control: inputs for what lies over the image, and a LoRA of rank {self.rank}"

    def base_sizes(self, sizes: ContextSizes) -> ContextSizes:
        """Return the sizes without those of maps, which the added inputs alone read."""
        return replace(sizes, spatial=0)

    def apply(self, network: nn.Module, conditioner: AdaptableConditioner) -> None:
        """Freeze the network and the conditioner, widen the input layer, and adapt the others.

        Raises:
            ConfigError: if the network has no such layer, nothing lies over the image, or no
                layer's name fits.
        """
        if not isinstance(network, Widenable):
            raise ConfigError(
                f"{type(network).__name__} names no input layer that could be widened",
                where="adapter.kind",
                hint="derive it from sfumato.nn.widenable.Widenable too, or use adapter.kind=lora",
            )
        sizes, factor = conditioner.sizes, conditioner.factor
        if not sizes.spatial:
            raise ConfigError(
                "control needs a context that lies over the image",
                where="conditioner",
                hint="use conditioner.doodle.guided=false, or another such as conditioner.image",
            )
        widened = _widen(network.input_layer(), network.image_channels, sizes.spatial)
        super().apply(network, conditioner)
        widened.control.requires_grad_(True)
        network.context, network.reads_maps = sizes, True
        controllable: Any = network
        controllable.__class__ = controlled(type(network))
        controllable.pixels = factor**2


def _widen(inputs: InputLayer, image_channels: int, map_channels: int) -> Widened:
    """Let an input layer read maps, in place.

    Raises:
        ConfigError: if layers of its type cannot be widened.
    """
    layer: Any = inputs.layer
    if type(layer) not in WIDENED:
        raise ConfigError(
            f"the input layer is a {type(layer).__name__}, which cannot be widened",
            where="adapter.kind",
            hint=f"possible are {', '.join(kind.__name__ for kind in WIDENED)}",
        )
    weight: Tensor = layer.weight
    outputs, own, *kernel = weight.shape
    added = own // image_channels * map_channels
    layer.__class__ = WIDENED[type(layer)]
    layer.control = nn.Parameter(
        torch.zeros((outputs, added, *kernel), dtype=torch.float32, device=weight.device)
    )
    layer.pixels = inputs.pixels
    widened: Widened = layer
    return widened
