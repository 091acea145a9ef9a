"""Guidance: denoisers made of denoisers. All of it is linear in any prediction, so it is written once, on the denoised pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.condition import Condition
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.level import Denoised, NoiseLevel, broadcast
from sfumato.diffusion.parameterizations import Sample

GuidanceScale = float | Callable[[NoiseLevel], Tensor]


def _extrapolate(bad: Denoised, good: Denoised, scale: GuidanceScale, level: NoiseLevel) -> Denoised:
    """bad + w (good - bad); w = 1 gives `good`."""
    weight = broadcast(scale(level), good.x0) if callable(scale) else scale
    return Denoised(bad.x0 + weight * (good.x0 - bad.x0), bad.eps + weight * (good.eps - bad.eps))


@dataclass(frozen=True, kw_only=True)
class ClassifierFree:
    """Away from a negative condition: bad + w (good - bad), both halves from one call on a doubled batch.

    Attributes:
        denoiser: trained with condition dropout.
        negative: what to move away from, for one image or for the batch: the null condition, or a negative prompt's.
        scale: w; 1 is off. A number, or a function of the level.
    Source: Ho & Salimans 2022 (arXiv:2207.12598).
    """

    denoiser: Denoiser
    negative: Condition
    scale: GuidanceScale

    def __call__(self, x: Tensor, level: NoiseLevel, condition: Condition) -> Denoised:
        both = self.denoiser(
            torch.cat([x, x]),
            level if level.alpha.ndim == 0 else NoiseLevel(torch.cat([level.alpha] * 2), torch.cat([level.sigma] * 2)),
            condition.concatenate(self.negative.expanded(len(x))),
        )
        (good_x0, bad_x0), (good_eps, bad_eps) = both.x0.chunk(2), both.eps.chunk(2)
        return _extrapolate(Denoised(bad_x0, bad_eps), Denoised(good_x0, good_eps), self.scale, level)


@dataclass(frozen=True, kw_only=True)
class AutoGuidance:
    """Away from a worse version of the same model (smaller, or trained for less long): Karras et al. 2024 (arXiv:2406.02507)."""

    good: Denoiser
    bad: Denoiser
    scale: GuidanceScale

    def __call__(self, x: Tensor, level: NoiseLevel, condition: Condition) -> Denoised:
        return _extrapolate(self.bad(x, level, condition), self.good(x, level, condition), self.scale, level)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """One denoiser (guided) for log-SNR in [low, high], another (plain) outside: Kynkäänniemi et al. 2024 (arXiv:2404.07724).

    For sampling, where a batch shares its level: only one of the two is called.
    """

    inside: Denoiser
    outside: Denoiser
    low: float = -float("inf")
    high: float = float("inf")

    def __call__(self, x: Tensor, level: NoiseLevel, condition: Condition) -> Denoised:
        logsnr = level.logsnr()
        chosen = self.inside if bool(((logsnr >= self.low) & (logsnr <= self.high)).all()) else self.outside
        return chosen(x, level, condition)


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Clamp the guess of x0 to the data's range; eps follows, so that the pair still explains x."""

    denoiser: Denoiser
    low: float = -1.0
    high: float = 1.0

    def __call__(self, x: Tensor, level: NoiseLevel, condition: Condition) -> Denoised:
        x0 = self.denoiser(x, level, condition).x0.clamp(self.low, self.high)
        return Sample().solve(x0, x, level)


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Dynamic thresholding: clamp x0 to its own `quantile` of |x0| and rescale to [-1, 1] (Saharia et al. 2022, arXiv:2205.11487)."""

    denoiser: Denoiser
    quantile: float = 0.995

    def __call__(self, x: Tensor, level: NoiseLevel, condition: Condition) -> Denoised:
        x0 = self.denoiser(x, level, condition).x0
        limit = torch.quantile(x0.flatten(1).abs().float(), self.quantile, dim=1).clamp(min=1).to(x0.dtype)
        limit = limit.view(-1, *[1] * (x0.ndim - 1))
        return Sample().solve(torch.minimum(torch.maximum(x0, -limit), limit) / limit, x, level)
