"""DDIM and DDPM: move along the denoised pair, with a part of the noise drawn again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.config.bounds import Bounded, Fraction
from sfumato.diffusion.noise_level import NoiseLevel
from sfumato.sampling.protocol import Denoise, History, Noise


def renewed_share(eta: float, start: NoiseLevel, stop: NoiseLevel) -> Tensor:
    """Return tau = eta^2 (1 - exp(logsnr - logsnr')), from `start` to `stop`.

    It is the share of the noise's variance that is drawn again in a step.
    """
    return eta**2 * -torch.expm1(start.logsnr() - stop.logsnr())


@dataclass(frozen=True)
class DDIM(Bounded):
    """x' = alpha' x0 + sigma' (sqrt(1 - tau) eps + sqrt(tau) z), tau = eta^2 (1 - exp(logsnr -
    logsnr')).

    `eta` is the paper's: 0 is deterministic (and is Euler's method in the coordinates of `Epsilon`,
    `Sample` and `Flow`), 1 is DDPM's ancestral sampling.

    Attributes:
        eta: 0 for DDIM, 1 for DDPM; fraction of the noise that is drawn again.
    Source: Song, Meng & Ermon 2021 (arXiv:2010.02502), eqs. 12 and 16; Ho et al. 2020
        (arXiv:2006.11239), algorithm 2.
    """

    eta: Fraction = 0.0

    @property
    def order(self) -> int:
        """1, the order of Euler's method."""
        return 1

    def step(
        self,
        denoise: Denoise,
        x: Tensor,
        start: NoiseLevel,
        stop: NoiseLevel,
        history: History,
        noise: Noise,
    ) -> Tensor:
        """Return alpha' x0 + sigma' (sqrt(1 - tau) eps + sqrt(tau) z), shape of `x`."""
        x0, eps = denoise(x, start)
        if self.eta == 0:
            return stop.mix(x0, eps)
        tau = renewed_share(self.eta, start.like(x), stop.like(x))
        return stop.mix(x0, torch.sqrt(1 - tau) * eps + torch.sqrt(tau) * noise(x))
