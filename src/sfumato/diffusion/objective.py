"""The training loss: times -> levels -> noisy images -> weighted error, one value per sample."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from sfumato.condition import NO_CONDITION, Condition
from sfumato.config.bounds import FractionBelowOne
from sfumato.diffusion.coupling import Coupling, Independent
from sfumato.diffusion.denoiser import NetworkDenoiser
from sfumato.diffusion.noise_level import Denoised, NoiseLevel
from sfumato.diffusion.schedules import Linear, Schedule, require_schedule
from sfumato.diffusion.weighting import Native, Weighting, target_weight
from sfumato.errors import ConfigError

SMALLEST_SHARE = 1e-3  # of a sample's area, below which weights lower its loss


class Times(Protocol):
    """Turn uniform draws (B,) in [0, 1) into the batch's times."""

    def __call__(self, uniform: Tensor) -> Tensor:
        """Return the times (B,) in [0, 1) for the draws."""
        ...


@dataclass(frozen=True)
class IndependentTimes:
    """An independent time for each sample."""

    kind: ClassVar[str] = "independent"

    def __call__(self, uniform: Tensor) -> Tensor:
        """Return the draws themselves as times."""
        return uniform


@dataclass(frozen=True)
class Stratified:
    """One time in each of B equal strata: the batch's mean loss varies far less (Kingma et al.
    2021, arXiv:2107.00630, app. I).

    Strata are dealt out in golden-ratio steps, so that any contiguous part of the batch (a rank's
    slice, a micro-batch) is spread over all noise levels too. Their start is drawn for each batch,
    from the same draws, so that a place in the batch is not tied to a stratum: an image that always
    has the same place sees all levels.
    """

    def __call__(self, uniform: Tensor) -> Tensor:
        """Return (stratum + u) / B, where the batch holds each of the B strata once."""
        count = len(uniform)
        # uniform, and independent of each of the draws for two or more of them
        offset = uniform.double().sum() % 1 * count
        stride = max(1, round(count * 0.618))
        while math.gcd(stride, count) > 1:
            stride += 1
        stratum = (torch.arange(count, device=uniform.device) * stride + offset.long()) % count
        return (stratum + uniform) / count


TimesConfig = Stratified | IndependentTimes


class Losses(NamedTuple):
    """The loss of each sample (B,), and the level at which it was taken, so that it can be binned
    by log-SNR.
    """

    per_sample: Tensor
    level: NoiseLevel


@dataclass(frozen=True, kw_only=True)
class Objective:
    """E_t w(lambda) |T^ - T|^2, averaged over each sample's elements.

    Attributes:
        schedule: with uniform t, the density of noise levels in training; its path need not be
            the sampler's.
        weighting: how much each level counts.
        coupling: which noise meets which image.
        times: how the batch's times are drawn.
        contrastive_weight: weight at which the distance to another image's target is subtracted
            from the loss (contrastive flow matching); 0.05 is usual. The other image is the
            previous one of the micro-batch.

    Source: contrast: Stoica et al. 2025 (arXiv:2506.05350), eq. 6.
    """

    schedule: Schedule = Linear()
    weighting: Weighting = Native()
    coupling: Coupling = Independent()
    times: TimesConfig = Stratified()
    contrastive_weight: FractionBelowOne = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.contrastive_weight < 1:
            raise ConfigError(
                f"contrastive_weight = {self.contrastive_weight}",
                where="objective",
                hint="use 0 to 0.1; at 1 or above the loss is unbounded below",
            )
        require_schedule(self.schedule, where="objective.schedule")

    def levels(self, uniform: Tensor) -> NoiseLevel:
        """Return the batch's noise levels for uniform draws (B,) in [0, 1).

        The draws should be float64; otherwise the last stratum may round to 1.
        """
        return self.schedule(self.times(uniform))

    def __call__(
        self,
        denoiser: NetworkDenoiser,
        x0: Tensor,
        condition: Condition = NO_CONDITION,
        *,
        level: NoiseLevel,
        noise: Tensor,
        weights: Tensor | None = None,
    ) -> Losses:
        """Return the loss of each sample, (B,), with its level.

        Args:
            x0: clean data (B, C, H, W), in the space the network works in.
            level: one noise level per sample, (B,).
            noise: standard normal draws, shape of `x0`.
            weights: of elements, (B, 1, H, W) from 0 to 1; None for 1. A sample's loss is the
                weighted mean of its errors.
        """
        parameterization = denoiser.parameterization
        pair = Denoised(x0, self.coupling(x0, noise))
        output = denoiser.predict(level.mix(*pair), level, condition)
        weights = x0.new_ones(1, 1, 1, 1) if weights is None else weights
        error = _distance(output, parameterization.target(pair, level), weights)
        if self.contrastive_weight and len(x0) > 1:
            another = Denoised(pair.x0.roll(1, 0), pair.eps.roll(1, 0))
            error = error - self.contrastive_weight * _distance(
                output, parameterization.target(another, level), weights
            )
        weight = target_weight(self.weighting, level, parameterization)
        return Losses(weight.to(error) * error, level)


def _distance(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    return weighted_mean((a - b).square(), weights)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean of each sample's values (B, C, H, W), (B,).

    Args:
        weights: (B, 1, H, W), from 0 to 1.
    """
    total = weights.flatten(1).mean(1).clamp(min=SMALLEST_SHARE)
    return (values * weights).flatten(1).mean(1) / total
