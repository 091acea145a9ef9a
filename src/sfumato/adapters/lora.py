"""LoRA: a frozen layer W plus a trained product of low rank, W + (alpha / rank) B A.

Layers are adapted in place: their own parameters keep their names and values, so that the frozen
base has the state dict that it had before.

Source: Hu et al. 2022 (arXiv:2106.09685).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.adapters.adapter import Adapter, Addition, freeze_base
from sfumato.config.bounds import Positive, Size
from sfumato.errors import ConfigError


class LowRank(Addition):
    """The part that a layer of any type gets.

    Attributes:
        lora_A, lora_B: the factors; B begins at zero, so that an adapted layer begins as it was.
        scale: alpha / rank.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scale: float

    def delta(self) -> Tensor:
        """Return the change of the layer's weight, of its shape."""
        product = self.lora_B.flatten(1) @ self.lora_A.flatten(1)
        shape: torch.Size = self.weight.shape  # type: ignore[assignment]
        return self.scale * product.view(shape)


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


@dataclass(frozen=True, kw_only=True)
class LoRA(Adapter):
    """Low-rank changes of chosen layers; everything else in the network is frozen.

    Attributes:
        rank: of each change.
        alpha: the change is multiplied by alpha / rank; null for alpha = rank.
        layers: regular expressions, found in the names of the layers that are adapted; all linear
            layers by default.
        convolutions: whether convolutions are adapted too.
    """

    kind: ClassVar[str] = "lora"

    rank: Size = 16
    alpha: Positive | None = None
    layers: tuple[str, ...] = ("",)
    convolutions: bool = False

    def __post_init__(self) -> None:
        for pattern in self.layers:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(
                    f"{pattern!r} is not a regular expression: {error}",
                    where="adapter.layers",
                    hint="write a part of a layer's name, such as attention or to_q",
                ) from None

    def apply(self, network: nn.Module, conditioner: nn.Module) -> None:
        """Freeze the network and the conditioner, and adapt the network's layers.

        Raises:
            ConfigError: if no layer's name fits.
        """
        network.requires_grad_(False)
        freeze_base(conditioner)
        kinds = (nn.Linear, nn.Conv2d) if self.convolutions else (nn.Linear,)
        # subclasses compute something else, or are adapted already
        layers = [(name, layer) for name, layer in network.named_modules() if type(layer) in kinds]
        chosen = [
            (name, layer)
            for name, layer in layers
            if any(re.search(pattern, name) for pattern in self.layers)
            and not (isinstance(layer, nn.Conv2d) and layer.groups > 1)
        ]
        if not chosen:
            raise ConfigError(
                f"none of {len(layers)} layers fits {', '.join(map(repr, self.layers))}",
                where="adapter.layers",
                hint="names are such as "
                + ", ".join(name for name, _ in layers[:: max(1, len(layers) // 4)][:4]),
            )
        for _, layer in chosen:
            _adapt(layer, self.rank, 1.0 if self.alpha is None else self.alpha / self.rank)


def _adapt(layer: Any, rank: int, scale: float) -> None:
    """Turn a layer into an adapted one, in place."""
    weight: Tensor = layer.weight
    outputs, inputs, *kernel = weight.shape
    layer.__class__ = LoRALinear if isinstance(layer, nn.Linear) else LoRAConv2d
    layer.lora_A = nn.Parameter(
        torch.empty((rank, inputs, *kernel), dtype=torch.float32, device=weight.device)
    )
    layer.lora_B = nn.Parameter(
        torch.zeros((outputs, rank, *[1] * len(kernel)), dtype=torch.float32, device=weight.device)
    )
    nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))
    layer.scale = scale


def adapted_layers(module: nn.Module) -> dict[str, LowRank]:
    """Return the adapted layers of a module, by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LowRank)}
