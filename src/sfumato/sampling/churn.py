"""EDM's stochastic sampling: add a little noise, then let any sampler take the longer step."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from sfumato.config.bounds import Bounded, Limit, NonNegative, Positive
from sfumato.diffusion.noise_level import NoiseLevel, broadcast
from sfumato.sampling.ddim import DDIM
from sfumato.sampling.dpm_solver import DPMSolverPP2M
from sfumato.sampling.multistep import Multistep
from sfumato.sampling.protocol import Denoise, History, Noise
from sfumato.sampling.runge_kutta import RungeKutta
from sfumato.sampling.unipc import UniPC

PlainSamplerConfig = DDIM | RungeKutta | Multistep | DPMSolverPP2M | UniPC


@dataclass(frozen=True)
class Churn(Bounded):
    """Raise sigma by the factor 1 + gamma with fresh noise, then step from there:
    `Churn(RungeKutta("heun", parameterization=Epsilon()))` is EDM's stochastic sampler, except that
    no noise is added before the last step, onto clean data.

    A sampler with memory forgets what it has evaluated wherever noise is added, and so steps there
    at its first order.

    Attributes:
        sampler: takes the step from the raised level.
        gamma: EDM's min(S_churn / steps, sqrt(2) - 1).
        low, high: EDM's S_min and S_max, bounds on sigma/alpha within which noise is added.
        inflation: EDM's S_noise, the standard deviation of the noise added.
    Source: Karras et al. 2022 (arXiv:2206.00364), algorithm 2.
    """

    sampler: PlainSamplerConfig = RungeKutta("heun")
    _: KW_ONLY
    gamma: NonNegative = math.sqrt(2) - 1
    low: Limit = 0.0
    high: Limit = math.inf
    inflation: Positive = 1.0

    @property
    def order(self) -> int:
        """The order of the inner sampler, which is reached if gamma = 0."""
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
        """Raise sigma to (1 + gamma) sigma with fresh noise, then take the inner sampler's step."""
        ratio = start.sigma / start.alpha
        gamma = self.gamma * ((ratio >= self.low) & (ratio <= self.high)).to(start.sigma)
        raised = NoiseLevel(start.alpha, start.sigma * (1 + gamma))
        added = torch.sqrt(raised.sigma**2 - start.sigma**2) * self.inflation
        x = x + broadcast(added, x) * noise(x)
        if bool((gamma > 0).any()):
            history.clear()  # evaluations of a trajectory that the noise has left
        return self.sampler.step(denoise, x, raised, stop, history, noise)
