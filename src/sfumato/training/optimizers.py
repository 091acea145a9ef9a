"""AdamW, its learning-rate schedule and gradient clipping."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from sfumato.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101); weight decay acts on matrices and kernels only.

    Attributes:
        learning_rate: the peak.
        warmup_steps: linear rise from 0.
        decay: course of the learning rate over the rest of the budget, down to `final` of the peak.
        clip: largest gradient norm; larger gradients are scaled down.
    """

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 50
    decay: Literal["constant", "cosine", "linear"] = "cosine"
    final: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not (self.learning_rate > 0 and self.clip > 0 and self.weight_decay >= 0 and self.warmup_steps >= 0):
            raise ConfigError(
                f"learning_rate = {self.learning_rate}, clip = {self.clip}, weight_decay = {self.weight_decay}, "
                f"warmup_steps = {self.warmup_steps}",
                where="optimizer",
                mend="learning_rate and clip are above 0, weight_decay and warmup_steps at least 0",
            )

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        """The optimizer of a model's parameters, matrices first."""
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas, eps=self.eps, fused=True)

    def rate(self, step: int, spent: float) -> float:
        """Learning rate of step `step` (from 0) when the share `spent` of the budget is used up."""
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        left = max(0.0, 1 - spent)
        course = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}[self.decay]
        return self.learning_rate * warm * (self.final + (1 - self.final) * course)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    """The optimizer's state as tensors named `<parameter>/<slot>`; empty before the first step."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}/{slot}": value
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
        if isinstance(value, torch.Tensor)
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for name, value in tensors.items():
        parameter, slot = name.rsplit("/", 1)
        target = parameters[parameter]
        # AdamW's step counter is a scalar; the moments live where, and laid out as, the parameter does.
        kept = value.to(target.device) if value.ndim == 0 else torch.empty_like(target).copy_(value)
        optimizer.state[target][slot] = kept
