"""Matrix products in eight bits, by torchao (extra `float8`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from sfumato.errors import ConfigError

MULTIPLE = 16  # of a matrix's sides, which the hardware requires


def convert_to_float8(network: nn.Module, layers: Sequence[nn.Linear]) -> None:
    """Convert some of a network's layers to float8 products, forward and backward, in place.

    Weights keep their names and values. Each tensor is scaled by its largest magnitude, and rounded
    to four bits of exponent and three of mantissa; in the backward pass, to five and two. A machine
    without float8 products does the same rounding and multiplies in float32: slower than without
    it, but enough to try it out.

    Raises:
        ConfigError: see `require_float8`.

    Source: Micikevicius et al. 2022 (arXiv:2209.05433).
    """
    fitting = {id(layer) for layer in require_float8(layers)}
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    settings = Float8LinearConfig(emulate=not has_float8(network), pad_inner_dim=True)
    convert_to_float8_training(
        network, module_filter_fn=lambda module, name: id(module) in fitting, config=settings
    )


def require_float8(layers: Sequence[nn.Linear]) -> list[nn.Linear]:
    """Return those of some layers whose sides the hardware can take.

    Raises:
        ConfigError: if torchao is missing, or no layer is left.
    """
    try:
        import torchao.float8  # noqa: F401
    except ImportError:
        raise ConfigError(
            "float8 needs torchao", where="precision", hint="pip install 'sfumato[float8]'"
        ) from None
    fitting = [layer for layer in layers if fits(layer)]
    if not fitting:
        raise ConfigError(
            f"float8 is for transformers whose hidden size is a multiple of {MULTIPLE}",
            where="precision",
            hint="use precision=bfloat16, or network.kind=dit with network.hidden_size a "
            f"multiple of {MULTIPLE}",
        )
    return fitting


def fits(layer: nn.Linear) -> bool:
    """Return whether both sides of a layer's weight are multiples of 16, as the hardware needs."""
    return all(side % MULTIPLE == 0 for side in layer.weight.shape)


def has_float8(network: nn.Module) -> bool:
    """Return whether the network is on a GPU with float8 products, of capability 8.9 or more."""
    device = next(network.parameters()).device
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
