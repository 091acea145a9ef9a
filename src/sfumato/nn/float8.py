"""Matrix products in eight bits, by torchao: the extra `float8`."""

from __future__ import annotations

import torch
from torch import nn

from sfumato.errors import ConfigError

MULTIPLE = 16  # of a matrix's sides, which the hardware asks for
SMALLEST = 64  # side: narrower ones lead into a network or out of it, where rounding shows and little is won


def in_float8(network: nn.Module) -> None:
    """Have the linear layers of `network` multiply in float8, forwards and backwards, in place. Weights stay what, and called as, they are.

    Each tensor is scaled by its largest magnitude, and rounded to four bits of exponent and three of mantissa, on the way back five and
    two. A machine without such products does the same rounding and multiplies in bfloat16: slower than not to, good for trying it out.

    Raises:
        ConfigError: without torchao, or where no layer is fit for it.

    Source: Micikevicius et al. 2022 (arXiv:2209.05433).
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise ConfigError("float8 needs torchao", where="precision", mend="pip install 'sfumato[float8]'") from None
    names = {name for name, module in network.named_modules() if isinstance(module, nn.Linear) and fits(module)}
    if not names:
        raise ConfigError(
            f"the network has no linear layers whose sides are multiples of {MULTIPLE}, {SMALLEST} or more",
            where="precision=float8",
            mend="use precision=bfloat16",
        )
    settings = Float8LinearConfig(emulate=not has_float8(network), pad_inner_dim=True)
    convert_to_float8_training(network, module_filter_fn=lambda module, name: name in names, config=settings)


def fits(layer: nn.Linear) -> bool:
    """Whether the hardware multiplies by its weight, and it is worth it."""
    return all(side % MULTIPLE == 0 and side >= SMALLEST for side in layer.weight.shape)


def has_float8(network: nn.Module) -> bool:
    """Whether the network is where such products are."""
    device = next(network.parameters()).device
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
