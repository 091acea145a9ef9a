"""Which of a model's parameters are trained, and which are frozen: `requires_grad` decides, before
training begins.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from sfumato.errors import ConfigError

M = TypeVar("M", bound=nn.Module)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def require_trainable(model: nn.Module) -> None:
    """Raise ConfigError if all parameters of a model are frozen."""
    if not trainable(model):
        raise ConfigError(
            f"all parameters of {type(model).__name__} are frozen",
            where="network",
            hint="leave `requires_grad` on in the layers that are to be trained",
        )


def frozen_names(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that are not trained."""
    return frozenset(
        name for name, parameter in model.named_parameters() if not parameter.requires_grad
    )


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that are not trained, by name."""
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }


def copy_sharing_frozen(model: M) -> M:
    """Copy a model; the copy shares the frozen parameters, which may be most of it."""
    shared: dict[int, Any] = {
        id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad
    }
    return copy.deepcopy(model, shared)


def count(parameters: Iterable[Tensor]) -> int:
    """Return the total number of elements of some parameters."""
    return sum(parameter.numel() for parameter in parameters)


def without(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return a state dict without the given names."""
    left_out = frozenset(names)
    return {name: tensor for name, tensor in tensors.items() if name not in left_out}


def describe(model: nn.Module) -> str:
    """Describe the number of parameters, and how many of them are trained if some are frozen."""
    total, trained = count(model.parameters()), count(trainable(model))
    parameters = f"{_short(total)} parameters"
    return parameters if trained == total else f"{parameters}, {_short(trained)} of them trained"


def _short(number: int) -> str:
    return f"{number / 1e6:.2f}M" if number >= 5_000 else str(number)
