"""Averages of the weights over training, which give better samples than the last weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.config.bounds import FractionBelowOne, InnerFraction
from sfumato.distributed.sharding import local
from sfumato.errors import ConfigError

LARGEST_WIDTH = 0.28  # of a power profile: at 1 / sqrt(12) all of the training counts alike


class EMA(Protocol):
    """A profile of averaging: `decay(step)` is the weight that the average keeps, for steps
    from 1.
    """

    def decay(self, step: int) -> float:
        """Return the weight of the old average, in [0, 1); that of the new weights is 1 - decay."""
        ...


@dataclass(frozen=True)
class PowerEMA:
    """A profile that keeps its shape as training grows: decay = (1 - 1/step)^(gamma + 1).

    Attributes:
        sigma_rel: standard deviation of the averaging window, as a share of the training so far;
            0.05 to 0.25.
    Source: Karras et al. 2024 (arXiv:2312.02696), eqs. 123 and 127.
    """

    kind: ClassVar[str] = "power"

    sigma_rel: InnerFraction = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.sigma_rel < LARGEST_WIDTH:
            raise ConfigError(
                f"sigma_rel = {self.sigma_rel}",
                where="ema",
                hint=f"use 0.05 to 0.25: above 0, and below {LARGEST_WIDTH}",
            )

    @cached_property
    def gamma(self) -> float:
        """The exponent of the profile: (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) = sigma_rel^2."""
        inverse = self.sigma_rel**-2
        return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())

    def decay(self, step: int) -> float:
        """Return (1 - 1/step)^(gamma + 1)."""
        return float((1 - 1 / step) ** (self.gamma + 1))


@dataclass(frozen=True)
class FixedEMA:
    """The classic exponential average, with `rate` kept at each step; warmed up as (1 + step)/(10 +
    step).

    Attributes:
        rate: fraction of the average that is kept at each step.
    """

    kind: ClassVar[str] = "exponential"

    rate: FractionBelowOne = 0.9999

    def decay(self, step: int) -> float:
        """Return min(rate, (1 + step)/(10 + step))."""
        return min(self.rate, (1 + step) / (10 + step))


EMAConfig = PowerEMA | FixedEMA

# least 1 - decay of an averaging step: float32 would round a much smaller one away
LEAST_STEP = 2.5e-4


class Pairs:
    """The tensors of an average beside those of its model, listed once: in each step of training, the
    walk through all modules would take longer than the averaging.

    Frozen parameters are the same objects in both, and stay as they are. Buffers, such as the
    statistics of batch norms, are copied.
    """

    def __init__(self, average: nn.Module, model: nn.Module) -> None:
        parameters = [
            (a, p)
            for a, p in zip(average.parameters(), model.parameters(), strict=True)
            if a is not p
        ]
        self.average: list[Tensor] = [local(a) for a, _ in parameters]
        self.model: list[Tensor] = [local(p) for _, p in parameters]
        self.buffers = list(zip(average.buffers(), model.buffers(), strict=True))

    @torch.no_grad()
    def lerp(self, decay: float) -> None:
        """Set average <- decay * average + (1 - decay) * model, in place."""
        torch._foreach_lerp_(self.average, self.model, 1 - decay)
        for target, source in self.buffers:
            target.copy_(source)


def update(pairs: Pairs, profile: EMA, step: int) -> None:
    """Update an average with the weights after their `step`-th change, counted from 1.

    If 1 - decay is so small that float32 would lose it, 1 - decay <= LEAST_STEP / 2, only every
    second, fourth, ... change is averaged, with the product of the decays since the last one. Which
    changes are averaged depends on the profile and on `step` only.
    """
    if step % stride(profile, step):
        return
    last = step - 1
    while last and last % stride(profile, last):
        last -= 1
    pairs.lerp(math.prod(profile.decay(number) for number in range(last + 1, step + 1)))


def stride(profile: EMA, step: int) -> int:
    """Return how many changes of the weights one averaging step covers.

    It is the largest 2^k with 2^k (1 - decay) <= LEAST_STEP, and 1 in short runs, where 1 - decay
    is larger.
    """
    rate = 1 - profile.decay(step)
    return 1 if rate * 2 > LEAST_STEP or rate <= 0 else 2 ** int(math.log2(LEAST_STEP / rate))
