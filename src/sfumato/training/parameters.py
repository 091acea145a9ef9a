"""Which of a model's parameters are trained, and which are frozen: `requires_grad` decides, before training begins."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that are trained, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def frozen_names(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that are not trained."""
    return frozenset(name for name, parameter in model.named_parameters() if not parameter.requires_grad)


def count(parameters: Iterable[Tensor]) -> int:
    """Numbers in some parameters."""
    return sum(parameter.numel() for parameter in parameters)


def without(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """A state dict without some names."""
    left_out = frozenset(names)
    return {name: tensor for name, tensor in tensors.items() if name not in left_out}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors with their names, types and shapes; "" if there are none."""
    if not tensors:
        return ""
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().cpu().contiguous()
        hashed.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        hashed.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def describe(model: nn.Module) -> str:
    """The number of parameters for a person, and how many of them are trained where some are frozen."""
    total, trained = count(model.parameters()), count(trainable(model))
    parameters = f"{total / 1e6:.2f}M parameters"
    return parameters if trained == total else f"{parameters}, {trained / 1e6:.2f}M of them trained"
