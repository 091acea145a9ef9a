"""The weights of a fine-tuned network with its changes inside, and what rounding loses of them.

Changes are added in float32 and rounded once. A change that is small beside a weight is lost to
rounding in part: what is left of it is measured, since the file alone does not show it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor, nn

from sfumato.adapters import changed_layers, without_added
from sfumato.errors import ConfigError
from sfumato.networks.diffusers_backbone import DiffusersBackbone
from sfumato.networks.diffusers_models import DiffusersConfig
from sfumato.networks.diffusers_weights import read_weights
from sfumato.nn.frozen_layers import dense_state
from sfumato.recipes.run import Run

K = TypeVar("K")
Tensors = dict[tuple[str, str], Tensor]  # by part and name
NETWORK = ""  # the part that is the network
MUCH = 0.05  # of a change, that should not be lost
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Merged:
    """The weights of a network of diffusers, under its own names.

    Attributes:
        tensors: with the changes inside, rounded.
        texts: those of each trained text encoder, in the same way, by the encoder's name.
        lines: what was merged and what rounding lost, to print.
        lost: share of the change that rounding lost, |written - wanted| / |change|, over all
            tensors that changed; None where there is nothing to compare with.
    """

    tensors: dict[str, Tensor]
    texts: dict[str, dict[str, Tensor]]
    lines: tuple[str, ...]
    lost: float | None


def merge(
    run: Run,
    network: DiffusersBackbone,
    dtype: torch.dtype,
    texts: Mapping[str, nn.Module] = MappingProxyType({}),
) -> Merged:
    """Merge the adapted layers of a network into its weights, and round them to `dtype`.

    Those of text encoders are merged in the same way.

    The change is that of the adapters, or else the difference from the weights that the run began
    with, if these are still there.

    Raises:
        ConfigError: naming a tensor that has values beyond the range of `dtype`.
    """
    require_dtype(dtype)
    parts = {NETWORK: network.model, **texts}
    base: Tensors = {}
    merged: Tensors = {}
    for part, module in parts.items():
        before, after = _merged(module)
        base |= {(part, name): tensor for name, tensor in before.items()}
        merged |= {(part, name): tensor for name, tensor in after.items()}
    adapted = len(base)
    lines = [f"{adapted} adapted layers merged in float32"] if adapted else []
    if run.network.frozen_in:
        lines.append(
            f"merged into the base as it was trained with, rounded to {run.network.frozen_in}"
        )
    if not adapted:
        weights, remark = _before(run)
        base = {key: weights[key[1]].float() for key in merged if key[1] in weights}
        lines += [remark] if remark else []
    rounded = {
        (part, name): round_tensor(f"{part}.{name}" if part else name, tensor, dtype)
        for (part, name), tensor in merged.items()
    }
    lost = rounding_loss(base, merged, rounded) if base else None
    if lost is not None and dtype is not torch.float32:
        lines.append(_loss_line(lost, dtype))
    elif dtype is not torch.float32:
        lines.append(f"weights are rounded to {NAMES[dtype]}")
    tensors = {
        part: {name: tensor for (place, name), tensor in rounded.items() if place == part}
        for part in parts
    }
    network_tensors = tensors.pop(NETWORK)
    return Merged(tensors=network_tensors, texts=tensors, lines=tuple(lines), lost=lost)


def require_dtype(dtype: torch.dtype) -> None:
    """Raise ConfigError for a precision that weights are not written in."""
    if dtype not in NAMES:
        raise ConfigError(
            f"{dtype} is not a precision of exported weights",
            where="export",
            hint=f"use {', '.join(NAMES.values())}",
        )


def _merged(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights of the adapted layers before and all weights after merging."""
    merged = {
        name: tensor.detach().cpu()
        for name, tensor in without_added(dense_state(model), model).items()
    }
    base: dict[str, Tensor] = {}
    with torch.no_grad():
        for layer, adapted in changed_layers(model).items():
            name = f"{layer}.weight"
            base[name] = merged[name].float()
            merged[name] = base[name] + adapted.delta().cpu().float()
    return base, merged


def _before(run: Run) -> tuple[dict[str, Tensor], str]:
    """Return the weights that a run of all weights began with, and a remark if they are gone."""
    config = run.network
    if not isinstance(config, DiffusersConfig) or not config.path:
        return {}, ""
    if not Path(config.path).is_dir():
        return {}, f"the base {config.path} is gone, so that the change is not measured"
    return dict(read_weights(Path(config.path), variant=config.variant)), ""


def round_tensor(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of floating-point numbers in `dtype`; others as they are.

    Raises:
        ConfigError: if it has values beyond the range of `dtype`.
    """
    if not tensor.is_floating_point():
        return tensor.contiguous()
    rounded = tensor.to(dtype).contiguous()
    if not bool(torch.isfinite(rounded).all()):
        largest = float(tensor.abs().max())
        raise ConfigError(
            f"{name} has values up to {largest:.3g}, and {NAMES[dtype]} ends at "
            f"{torch.finfo(dtype).max:.3g}",
            where="export",
            hint="use --dtype bfloat16 or float32"
            if math.isfinite(largest)
            else "the weights are damaged: use an earlier checkpoint",
        )
    return rounded


def rounding_loss(
    base: Mapping[K, Tensor], merged: Mapping[K, Tensor], rounded: Mapping[K, Tensor]
) -> float | None:
    """Return the share of a change that rounding loses; None if nothing changed.

    It is the norm of (rounded - base, rounded alike) - (merged - base), over that of merged - base:
    what a program sees that compares the written weights with the written base.
    """
    left, change = 0.0, 0.0
    for name, before in base.items():
        wanted = merged[name].double() - before.double()
        written = rounded[name].double() - before.to(rounded[name].dtype).double()
        left += float((written - wanted).square().sum())
        change += float(wanted.square().sum())
    return math.sqrt(left / change) if change else None


def _loss_line(lost: float, dtype: torch.dtype) -> str:
    line = f"rounding to {NAMES[dtype]} loses {lost:.2%} of the change"
    if lost <= MUCH:
        return line
    better = "float16 or float32" if dtype is torch.bfloat16 else "float32"
    return f"{line}: more than {MUCH:.0%}, so that --dtype {better} keeps more of what was learned"
