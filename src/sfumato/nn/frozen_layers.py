"""Frozen layers whose weights are stored in fewer bits than they are computed in.

A layer computes in the precision of its input: its weight is unpacked for the product, and again in
the backward pass, since the unpacked copies of all layers would take the memory that was saved.
Norms, biases and small layers stay in float32.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

Storage = Literal["float32", "bfloat16", "int8"]

# half the range of int8, which has one more negative value: as torchao scales weights
HALF_RANGE = 127.5


class PackedWeight(nn.Module):
    """What layers of any type with a stored weight have.

    Attributes:
        weight: in bfloat16 or int8, frozen.
        weight_scale: float32, what a row of int8 values is multiplied by; None in bfloat16.
    """

    weight: Tensor
    weight_scale: Tensor | None

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight in the precision of a product."""
        return unpack(self.weight, self.weight_scale, dtype)


class FrozenLinear(nn.Linear, PackedWeight):
    """A linear layer with a stored weight; gradients flow to its input only."""

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b in the precision of x, or that of autocast."""
        x = x.to(product_dtype(x))
        if not (torch.is_grad_enabled() and x.requires_grad):
            return F.linear(x, self.dense(x.dtype), _like(self.bias, x))
        result: Tensor = _Linear.apply(x, self.weight, self.weight_scale, _like(self.bias, x))  # type: ignore[no-untyped-call]
        return result


class FrozenConv2d(nn.Conv2d, PackedWeight):
    """A convolution with a stored weight, padded with zeros; gradients flow to its input only."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution in the precision of x, or that of autocast."""
        x = x.to(product_dtype(x))
        geometry: tuple[Any, ...] = (self.stride, self.padding, self.dilation, self.groups)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return F.conv2d(x, self.dense(x.dtype), _like(self.bias, x), *geometry)
        result: Tensor = _Convolution.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.weight_scale, _like(self.bias, x), geometry
        )
        return result


class _Linear(torch.autograd.Function):
    """A product that remembers the stored weight, and neither the unpacked one nor its input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, unpack(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        weight, scale = ctx.saved_tensors
        return gradient @ unpack(weight, scale, gradient.dtype), None, None, None


class _Convolution(torch.autograd.Function):
    """The same for a convolution."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        geometry: tuple[Any, ...],
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.shape, ctx.geometry = x.shape, geometry
        return F.conv2d(x, unpack(weight, scale, x.dtype), bias, *geometry)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        weight, scale = ctx.saved_tensors
        weight = unpack(weight, scale, gradient.dtype)
        before = conv2d_input(ctx.shape, weight, gradient, *ctx.geometry)
        return before, None, None, None, None


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the precision that autocast would give a product of x."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _like(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)


def pack(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return a weight as it is stored, and its scale.

    In int8, each row (the weights of one output) is divided by its largest magnitude / 127.5 and
    rounded.

    Args:
        dtype: bfloat16, or int8 for a matrix.
    """
    if dtype.is_floating_point:
        return weight.to(dtype, copy=True), None
    values = weight.to(torch.float32)
    largest = values.abs().amax(1, keepdim=True)
    scale = (largest / HALF_RANGE).clamp(min=torch.finfo(torch.float32).tiny)
    return (values * scale.reciprocal()).round_().clamp_(-128, 127).to(dtype), scale


def unpack(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return a stored weight in the precision of a product, rounded once."""
    return weight.to(dtype) if scale is None else (weight * scale).to(dtype)


def pack_layers(module: nn.Module, storage: Storage, *, precise: Sequence[str] = ()) -> None:
    """Store the weights of a module's layers in fewer bits, in place, and freeze them.

    int8 is for linear layers; convolutions are stored in bfloat16 then.

    Args:
        precise: regular expressions, found in the names of layers that stay in float32.
    """
    if storage == "float32":
        return
    linear = torch.int8 if storage == "int8" else torch.bfloat16
    for name, layer in module.named_modules():
        if any(re.search(pattern, name) for pattern in precise):
            continue
        if type(layer) is nn.Linear:
            _pack_layer(layer, FrozenLinear, linear)
        elif type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
            _pack_layer(layer, FrozenConv2d, torch.bfloat16)


def _pack_layer(layer: Any, kind: type[PackedWeight], dtype: torch.dtype) -> None:
    weight, scale = pack(layer.weight.detach(), dtype)
    layer.__class__ = kind
    layer.requires_grad_(False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.weight_scale = None if scale is None else nn.Parameter(scale, requires_grad=False)


def packed_layers(module: nn.Module) -> dict[str, PackedWeight]:
    """Return the layers of a module whose weights are stored in fewer bits, by name."""
    return {
        name: layer for name, layer in module.named_modules() if isinstance(layer, PackedWeight)
    }


def without_scales(state: Mapping[str, Tensor], packed: Iterable[str]) -> dict[str, Tensor]:
    """Return a state dict without the scales of the named layers, which float weights have not."""
    scales = {f"{name}.weight_scale" for name in packed}
    return {name: tensor for name, tensor in state.items() if name not in scales}


def dense_state(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state dict with the stored weights unpacked, to float32."""
    layers = packed_layers(module)
    dense = {f"{name}.weight": layer.dense() for name, layer in layers.items()}
    return without_scales(module.state_dict(), layers) | dense
