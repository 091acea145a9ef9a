"""Matrix products in eight bits, by torchao: the extra `float8`."""

from __future__ import annotations

import torch
from torch import nn

from sfumato.errors import ConfigError

MULTIPLE = 16  # of a matrix's sides, which the hardware asks for


def in_float8(network: nn.Module) -> None:
    """Have the blocks of a transformer multiply in float8, forwards and backwards, in place. Weights stay what, and called as, they are.

    Each tensor is scaled by its largest magnitude, and rounded to four bits of exponent and three of mantissa, on the way back five and
    two. A machine without such products does the same rounding and multiplies in float32: slower than not to, good for trying it out.

    Raises:
        ConfigError: see `float8_layers`.

    Source: Micikevicius et al. 2022 (arXiv:2209.05433).
    """
    names = float8_layers(network)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    settings = Float8LinearConfig(emulate=not has_float8(network), pad_inner_dim=True)
    convert_to_float8_training(network, module_filter_fn=lambda module, name: name in names, config=settings)


def float8_layers(network: nn.Module) -> set[str]:
    """Names of the linear layers in a transformer's blocks whose sides the hardware can take.

    Raises:
        ConfigError: without torchao, or where there are none.
    """
    try:
        import torchao.float8  # noqa: F401
    except ImportError:
        raise ConfigError("float8 needs torchao", where="precision", mend="pip install 'sfumato[float8]'") from None
    names = {name for name, module in network.named_modules() if name.startswith("blocks.") and fits(module)}
    if not names:
        raise ConfigError(
            f"float8 is for transformers whose channels are a multiple of {MULTIPLE}",
            where="precision",
            mend=f"use precision=bfloat16, or network.kind=DiTConfig with network.channels a multiple of {MULTIPLE}",
        )
    return names


def fits(module: nn.Module) -> bool:
    """Whether it is a linear layer whose weight the hardware multiplies by."""
    return isinstance(module, nn.Linear) and all(side % MULTIPLE == 0 for side in module.weight.shape)


def has_float8(network: nn.Module) -> bool:
    """Whether the network is where such products are."""
    device = next(network.parameters()).device
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
