"""DPM-Solver++(2M), deterministic and stochastic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sfumato.config.bounds import Bounded, Fraction
from sfumato.diffusion.noise_level import NoiseLevel
from sfumato.sampling.ddim import renewed_share
from sfumato.sampling.protocol import Denoise, History, Noise, Point


@dataclass(frozen=True)
class DPMSolverPP2M(Bounded):
    """x' = q x + (alpha' - alpha q) D + sigma' sqrt(tau) z, q = sigma'/sigma sqrt(1 - tau), D = x0
    + (x0 - x0_prev)/(2r).

    r is the ratio of the last step to this one in log-SNR; tau = eta^2 (1 - exp(logsnr - logsnr'))
    as in `DDIM`. eta = 0 is DPM-Solver++(2M), eta = 1 its SDE form. Without the extrapolation of D
    this is DDIM.

    Attributes:
        eta: 0 for the deterministic solver, 1 for the stochastic one.
    Source: Lu et al. 2022 (arXiv:2211.01095), algorithm 2 and eq. 19 (SDE).
    """

    kind: ClassVar[str] = "dpm-solver++2m"

    eta: Fraction = 0.0

    @property
    def order(self) -> int:
        """2, since D is extrapolated from two evaluations."""
        return 2

    def step(
        self,
        denoise: Denoise,
        x: Tensor,
        start: NoiseLevel,
        stop: NoiseLevel,
        history: History,
        noise: Noise,
    ) -> Tensor:
        """Return q x + (alpha' - alpha q) D + sigma' sqrt(tau) z; D = x0 without a history."""
        x0 = denoise(x, start).x0
        estimate = x0
        a, b = start.like(x), stop.like(x)
        if history:
            previous = history[0]
            ratio = (a.logsnr() - previous.level.like(x).logsnr()) / (b.logsnr() - a.logsnr())
            estimate = x0 + (x0 - previous.target) / (2 * ratio)
        history.appendleft(Point(start, x0, x))
        tau = renewed_share(self.eta, a, b)
        q = b.sigma / a.sigma * torch.sqrt(1 - tau)
        moved = q * x + (b.alpha - a.alpha * q) * estimate
        return moved if self.eta == 0 else moved + b.sigma * torch.sqrt(tau) * noise(x)
