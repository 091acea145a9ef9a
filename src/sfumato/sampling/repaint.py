"""RePaint: each step is taken several times, with fresh noise in between, so that what is generated
fits what is known.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from sfumato.diffusion.noise_level import NoiseLevel, broadcast
from sfumato.errors import ConfigError
from sfumato.sampling.churn import Churn
from sfumato.sampling.ddim import DDIM
from sfumato.sampling.protocol import Denoise, History, Noise
from sfumato.sampling.runge_kutta import RungeKutta


@dataclass(frozen=True)
class RePaint:
    """Step down, return to the level above with fresh noise, and step down again, `times` in all.

    Attributes:
        sampler: takes each step; one that remembers earlier steps would mix trajectories and is
            refused.
        times: steps down for each step of the grid; 1 leaves `sampler` as it is.
    Raises:
        ConfigError: for a sampler with memory, or fewer than 1 time.
    Source: Lugmayr et al. 2022 (arXiv:2201.09865), algorithm 1, with jumps of one step.
    """

    sampler: DDIM | RungeKutta | Churn = DDIM(eta=1.0)
    _: KW_ONLY
    times: int = 10

    def __post_init__(self) -> None:
        inner = self.sampler.sampler if isinstance(self.sampler, Churn) else self.sampler
        if not isinstance(inner, DDIM | RungeKutta) or self.times < 1:
            raise ConfigError(
                f"{type(self.sampler).__name__} repeated {self.times} times",
                where="sample",
                hint="use a sampler without memory (ddpm, ddim, euler, midpoint, heun, rk4 or "
                "churn), at least 1 time",
            )

    @property
    def order(self) -> int:
        """The order of the inner sampler, which is reached if times = 1."""
        return self.sampler.order

    def step(
        self,
        denoise: Denoise,
        x: Tensor,
        start: NoiseLevel,
        stop: NoiseLevel,
        history: History,
        noise: Noise,
    ) -> Tensor:
        """Step down `times` times, each time but the last returning to `start` with fresh noise."""
        scale = start.alpha / stop.alpha
        added = torch.sqrt(start.sigma**2 - (scale * stop.sigma) ** 2)
        for _ in range(self.times - 1):
            down = self.sampler.step(denoise, x, start, stop, history, noise)
            x = broadcast(scale, down) * down + broadcast(added, down) * noise(down)
        return self.sampler.step(denoise, x, start, stop, history, noise)
