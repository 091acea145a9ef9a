"""Exact denoisers in one dimension, each with the exact map of the probability-flow ODE between two
levels (float64).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ndtr
from torch import Tensor

from sfumato.condition import NO_CONDITION
from sfumato.diffusion import Denoised, NoiseLevel, Sample


@dataclass(frozen=True)
class Gaussian:
    """x0 ~ N(mean, variance)."""

    mean: float = 0.7
    variance: float = 0.25

    def __call__(self, x: Tensor, level: NoiseLevel, condition=NO_CONDITION) -> Denoised:
        a = level.like(x)
        gain = a.alpha * self.variance / (a.alpha**2 * self.variance + a.sigma**2)
        return Sample().solve(self.mean + gain * (x - a.alpha * self.mean), x, level)

    def flow(self, x: Tensor, start: NoiseLevel, stop: NoiseLevel) -> Tensor:
        spread = torch.sqrt(
            (stop.alpha**2 * self.variance + stop.sigma**2)
            / (start.alpha**2 * self.variance + start.sigma**2)
        )
        return stop.alpha * self.mean + spread * (x - start.alpha * self.mean)


@dataclass(frozen=True)
class Mixture:
    """x0 from two narrow Gaussians. In one dimension the ODE is the monotone map that matches the
    noisy marginals' CDFs.
    """

    means: tuple[float, float] = (-1.0, 1.4)
    weights: tuple[float, float] = (0.3, 0.7)
    variance: float = 0.3

    def __call__(self, x: Tensor, level: NoiseLevel, condition=NO_CONDITION) -> Denoised:
        a = level.like(x)
        variance = a.alpha**2 * self.variance + a.sigma**2
        offsets = [x - a.alpha * mean for mean in self.means]
        logits = torch.stack(
            [np.log(w) - o**2 / (2 * variance) for w, o in zip(self.weights, offsets, strict=True)]
        )
        guesses = torch.stack(
            [
                mean + a.alpha * self.variance / variance * o
                for mean, o in zip(self.means, offsets, strict=True)
            ]
        )
        return Sample().solve((torch.softmax(logits, 0) * guesses).sum(0), x, level)

    def _cdf(self, x: np.ndarray, level: NoiseLevel) -> np.ndarray:
        alpha, sigma = float(level.alpha), float(level.sigma)
        spread = np.sqrt(alpha**2 * self.variance + sigma**2)
        return sum(
            w * ndtr((x - alpha * mean) / spread)
            for w, mean in zip(self.weights, self.means, strict=True)
        )

    def flow(self, x: Tensor, start: NoiseLevel, stop: NoiseLevel) -> Tensor:
        wanted = self._cdf(x.numpy(), start)
        low, high = np.full(x.shape, -60.0), np.full(x.shape, 60.0)
        for _ in range(70):  # bisection to the last bit
            middle = (low + high) / 2
            below = self._cdf(middle, stop) < wanted
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return torch.from_numpy((low + high) / 2)


ORACLES = {"gaussian": Gaussian(), "mixture": Mixture()}
