"""LoRA: a frozen layer W plus a trained product of low rank, W + (alpha / rank) B A.

Layers are adapted in place: their own parameters keep their names and values, so that the frozen
base has the state dict that it had before. Products add up: several are one of the sum of their
ranks, with their factors side by side.

Source: Hu et al. 2022 (arXiv:2106.09685).
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.adapters.adapter import AdaptableConditioner, Adapter, ChangedLayer, freeze_base
from sfumato.config.bounds import Positive, Size
from sfumato.errors import ConfigError, ShapeError
from sfumato.nn.frozen_layers import FrozenConv2d, FrozenLinear

M = TypeVar("M", bound=nn.Module)
N = TypeVar("N", int, float)


@dataclass(frozen=True)
class Factors:
    """A change of a layer's weight, scale * up @ down.

    Attributes:
        down: (rank, inputs) of a linear layer, (rank, inputs, k, k) of a convolution.
        up: (outputs, rank), (outputs, rank, 1, 1).
        scale: alpha / rank, times a strength.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Rank of the change at most."""
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """Return the change, of the shape of the layer's weight."""
        product = self.up.flatten(1) @ self.down.flatten(1)
        return self.scale * product.view(len(self.up), *self.down.shape[1:])

    def fits(self, shape: torch.Size) -> bool:
        """Return whether a weight of this shape can be changed; 1 x 1 kernels are linear layers."""
        outputs, *inputs = shape
        plain = (*inputs, *[1] * (4 - len(shape)))
        own = (*self.down.shape[1:], *[1] * (4 - self.down.ndim))
        return plain == own and self.up.flatten(1).shape == (outputs, self.rank)

    def shaped(self, shape: torch.Size) -> Factors:
        """Return the factors in the shapes that belong to a weight of this shape, which they fit."""
        down = self.down.reshape(self.rank, *shape[1:])
        up = self.up.reshape(shape[0], self.rank, *[1] * (len(shape) - 2))
        return replace(self, down=down, up=up)

    def times(self, strength: float) -> Factors:
        """Return the factors of `strength` times the change."""
        return replace(self, scale=strength * self.scale)

    def map(self, function: Callable[[Tensor], Tensor]) -> Factors:
        """Return the factors with a function applied to both."""
        return replace(self, down=function(self.down), up=function(self.up))

    def folded(self) -> Factors:
        """Return factors of the same change with a scale of 1: it is multiplied into the second."""
        return Factors(self.down, self.scale * self.up)


class LowRank(ChangedLayer):
    """The part that a layer of any type gets.

    Attributes:
        lora_A, lora_B: the factors; B begins at zero, so that an adapted layer begins as it was.
        scale: alpha / rank.
    """

    added: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scale: float

    def factors(self) -> Factors:
        """Return the change as factors; the scale is multiplied into the second."""
        return Factors(self.lora_A.detach(), self.lora_B.detach(), self.scale).folded()

    def delta(self) -> Tensor:
        """Return the change of the layer's weight, of its shape, in float32."""
        return self.factors().delta()


class LoRALinear(nn.Linear, LowRank):
    """A linear layer with a product of low rank: A (rank, in), B (out, rank)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b + scale B A x."""
        base = super().forward(x)
        if not self.adapted:
            return base
        return base + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


class LoRAConv2d(nn.Conv2d, LowRank):
    """A convolution with a product of low rank: A (rank, in, k, k), B (out, rank, 1, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution, plus scale times that by A and then by B."""
        base = super().forward(x)
        if not self.adapted:
            return base
        return base + self.scale * F.conv2d(self._conv_forward(x, self.lora_A, None), self.lora_B)


class LoRAFrozenLinear(LoRALinear, FrozenLinear):
    """The same for a weight that is stored in fewer bits; the factors are float32."""


class LoRAFrozenConv2d(LoRAConv2d, FrozenConv2d):
    """The same for a weight that is stored in fewer bits; the factors are float32."""


# the class of a layer after it was adapted, by that before; other subclasses compute something else
LINEAR: dict[type[nn.Module], type[LowRank]] = {
    nn.Linear: LoRALinear,
    FrozenLinear: LoRAFrozenLinear,
}
ADAPTED = LINEAR | {nn.Conv2d: LoRAConv2d, FrozenConv2d: LoRAFrozenConv2d}


@dataclass(frozen=True, kw_only=True)
class LoRA(Adapter):
    """Low-rank changes of chosen layers; everything else in the network is frozen.

    Attributes:
        rank: of each change.
        alpha: the change is multiplied by alpha / rank; null for alpha = rank.
        layers: regular expressions, found in the names of the layers that are adapted; all linear
            layers by default.
        convolutions: whether convolutions are adapted too.
        text_encoders: whether the linear layers of the text encoders' blocks are adapted too, whose
            names begin with text_encoder (Stable Diffusion 1, 2, XL). Texts are then encoded in
            each step.
        rank_pattern: other ranks, by regular expressions of layers' names; the first one that is
            found in a name counts.
        alpha_pattern: other alphas, in the same way.
        initial: a LoRA file, or a run with a LoRA, whose values the factors begin with; "" for a
            change of zero.
        initial_hash: SHA-256 of these values, which must not change before the first step.
    """

    kind: ClassVar[str] = "lora"

    rank: Size = 16
    alpha: Positive | None = None
    layers: tuple[str, ...] = ("",)
    convolutions: bool = False
    text_encoders: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    initial: str = ""
    initial_hash: str = ""

    def __post_init__(self) -> None:
        for key, values in (("rank", self.rank_pattern), ("alpha", self.alpha_pattern)):
            for pattern, value in values.items():
                if value <= 0:
                    raise ConfigError(
                        f"{pattern!r}: {value}",
                        where=f"adapter.{key}_pattern",
                        hint="use numbers above 0",
                    )
        require_patterns((*self.layers, *self.rank_pattern, *self.alpha_pattern))

    @property
    def described(self) -> str:
        """What is trained, in words."""
        ranks = sorted({self.rank, *self.rank_pattern.values()})
        rank = f"{self.rank}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        texts = ", text encoders too" if self.text_encoders else ""
        start = f", which begins as {Path(self.initial).name}" if self.initial else ""
        return f"LoRA of rank {rank}{texts}{start}"

    @property
    def begins_with(self) -> str:
        """Where the first values come from."""
        return self.initial

    def rank_of(self, layer: str) -> int:
        """Return the rank of a layer's change."""
        return _of(self.rank_pattern, layer, self.rank)

    def scale_of(self, layer: str) -> float:
        """Return what a layer's product is multiplied by, alpha / rank."""
        rank = self.rank_of(layer)
        return _of(self.alpha_pattern, layer, rank if self.alpha is None else self.alpha) / rank

    def apply(self, network: nn.Module, conditioner: AdaptableConditioner) -> None:
        """Freeze the network and the conditioner, and adapt the network's layers, and perhaps those
        of the text encoders.

        Raises:
            ConfigError: if no layer's name fits.
        """
        texts = self._text_layers(conditioner)
        network.requires_grad_(False)
        freeze_base(conditioner)
        kinds = ADAPTED if self.convolutions else LINEAR
        chosen = chosen_layers(adaptable_layers(network), self.layers, kinds)
        for name, layer in {**chosen, **texts}.items():
            _adapt(layer, _initial(layer.weight, self.rank_of(name), self.scale_of(name)))

    def _text_layers(self, conditioner: AdaptableConditioner) -> dict[str, Any]:
        """Return the layers of the text encoders that are adapted, by name.

        Raises:
            ConfigError: if the model has no text encoders that can be trained, or no layer's name
                fits.
        """
        if not self.text_encoders:
            return {}
        if not conditioner.text_layers():
            raise ConfigError(
                "the model has no text encoders that can be trained",
                where="adapter.text_encoders",
                hint="leave it out; those of Stable Diffusion 1, 2 and XL can be trained",
            )
        conditioner.include_text_encoders()
        return chosen_layers(conditioner.text_layers(), self.layers, LINEAR)


def require_patterns(patterns: Sequence[str]) -> None:
    """Raise ConfigError unless all are regular expressions."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"{pattern!r} is not a regular expression: {error}",
                where="adapter.layers",
                hint="write a part of a layer's name, such as attention or to_q",
            ) from None


def chosen_layers(
    among: Mapping[str, nn.Module], patterns: Sequence[str], kinds: Collection[type[nn.Module]]
) -> dict[str, Any]:
    """Return the layers of some types in whose names a pattern is found, by name.

    Raises:
        ConfigError: if no layer's name fits.
    """
    # those of other types are adapted already
    layers = {name: layer for name, layer in among.items() if type(layer) in kinds}
    chosen = {
        name: layer
        for name, layer in layers.items()
        if any(re.search(pattern, name) for pattern in patterns)
    }
    if not chosen:
        raise ConfigError(
            f"none of {len(layers)} layers fits {', '.join(map(repr, patterns))}",
            where="adapter.layers",
            hint=f"names are such as {', '.join(list(layers)[:: max(1, len(layers) // 4)][:4])}",
        )
    return chosen


def _of(patterns: Mapping[str, N], layer: str, default: N) -> N:
    """Return the value of the first pattern that is found in a layer's name."""
    found = (value for pattern, value in patterns.items() if re.search(pattern, layer))
    return next(found, default)


def _adapt(layer: Any, factors: Factors) -> None:
    """Turn a layer into an adapted one, in place."""
    layer.__class__ = ADAPTED.get(type(layer), type(layer))
    layer.lora_A, layer.lora_B = nn.Parameter(factors.down), nn.Parameter(factors.up)
    layer.scale = factors.scale


def _initial(weight: Tensor, rank: int, scale: float) -> Factors:
    """Return the factors that training begins with; their product is zero."""
    outputs, inputs, *kernel = weight.shape
    options: dict[str, Any] = {"dtype": torch.float32, "device": weight.device}
    down = torch.empty((rank, inputs, *kernel), **options)
    nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    return Factors(down, torch.zeros((outputs, rank, *[1] * len(kernel)), **options), scale)


def adaptable_layers(module: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the layers of a module that a product can be added to, by name; some may have one."""
    kinds = (*ADAPTED, *ADAPTED.values())
    return {
        name: layer
        for name, layer in module.named_modules()
        if type(layer) in kinds and not (isinstance(layer, nn.Conv2d) and layer.groups > 1)
    }


def add_product(layer: Any, factors: Factors) -> None:
    """Add a change to what a layer computes, in place; its weight stays as it is.

    Raises:
        ShapeError: if the factors do not fit the layer.
    """
    weight: Tensor = layer.weight
    if not factors.fits(weight.shape):
        raise ShapeError(
            f"factors {tuple(factors.down.shape)} and {tuple(factors.up.shape)} do not fit a weight "
            f"of {tuple(weight.shape)}",
            where="LoRA",
            hint="it was made for another model",
        )
    added = factors.shaped(weight.shape).map(
        lambda factor: factor.to(device=weight.device, dtype=torch.float32)
    )
    if isinstance(layer, LowRank):
        own, added = layer.factors(), added.folded()
        added = Factors(torch.cat([own.down, added.down]), torch.cat([own.up, added.up], dim=1))
    _adapt(layer, added)
    layer.requires_grad_(False)


def sharing_tensors(module: M) -> M:
    """Copy a module; the copy shares all parameters and buffers with it.

    What is added to a layer of the copy changes nothing in the original.
    """
    tensors = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def adapted_layers(module: nn.Module) -> dict[str, LowRank]:
    """Return the adapted layers of a module, by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LowRank)}
