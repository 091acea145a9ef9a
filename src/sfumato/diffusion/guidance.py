"""Guidance: denoisers made of denoisers. Its combinations are linear in any prediction, so they are
written once, on the denoised pair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.condition import Condition
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.noise_level import Denoised, NoiseLevel, broadcast
from sfumato.diffusion.parameterizations import Sample

GuidanceScale = float | Callable[[NoiseLevel], Tensor]


def _extrapolate(
    bad: Denoised, good: Denoised, scale: GuidanceScale, level: NoiseLevel
) -> Denoised:
    """Return bad + w (good - bad); w = 1 gives `good`."""
    weight = broadcast(scale(level), good.x0) if callable(scale) else scale
    return Denoised(bad.x0 + weight * (good.x0 - bad.x0), bad.eps + weight * (good.eps - bad.eps))


class GuidanceTerm(NamedTuple):
    """A condition of one image, or of the batch, and the scale of the step from it to the next one.

    A scale of 1 goes up to the next condition, a larger one beyond it.
    """

    condition: Condition
    scale: GuidanceScale


@dataclass(frozen=True, kw_only=True)
class ClassifierFree:
    """Guidance away from weaker conditions: d_0 + sum_i w_i (d_(i+1) - d_i), from one call on a
    larger batch.

    With one term, the null or a negative condition, this is classifier-free guidance: d_0 + w (d -
    d_0). Further terms, which hold some of the contexts, give each context its own scale.

    Attributes:
        denoiser: trained with condition dropout.
        terms: the conditions of d_0, d_1, ... and w_0, w_1, ...; the last step goes to the
            requested condition.
    Source: Ho & Salimans 2022 (arXiv:2207.12598); Brooks et al. 2023 (arXiv:2211.09800), eq. 3.
    """

    denoiser: Denoiser
    terms: tuple[GuidanceTerm, ...]

    def __call__(self, x: Tensor, level: NoiseLevel, condition: Condition) -> Denoised:
        """Return the guided pair, from one call of the denoiser on B (terms + 1) images."""
        count = len(self.terms) + 1
        negatives = [term.condition.expand(len(x)) for term in self.terms]
        denoised = self.denoiser(
            torch.cat([x] * count),
            level
            if level.alpha.ndim == 0
            else NoiseLevel(torch.cat([level.alpha] * count), torch.cat([level.sigma] * count)),
            reduce(Condition.concat_batch, [condition, *negatives]),
        )
        target, *references = (
            Denoised(x0, eps)
            for x0, eps in zip(denoised.x0.chunk(count), denoised.eps.chunk(count), strict=True)
        )
        guided = references[0]
        for term, (x0, eps), (next_x0, next_eps) in zip(
            self.terms, references, [*references[1:], target], strict=True
        ):
            weight = broadcast(term.scale(level), x0) if callable(term.scale) else term.scale
            guided = Denoised(
                guided.x0 + weight * (next_x0 - x0), guided.eps + weight * (next_eps - eps)
            )
        return guided


@dataclass(frozen=True, kw_only=True)
class WithCondition:
    """A denoiser with a fixed condition, of one image or of the batch, whatever is requested."""

    denoiser: Denoiser
    condition: Condition

    def __call__(self, x: Tensor, level: NoiseLevel, condition: Condition) -> Denoised:
        """Return the denoised pair under the fixed condition; `condition` is ignored."""
        return self.denoiser(x, level, self.condition.expand(len(x)))


@dataclass(frozen=True, kw_only=True)
class AutoGuidance:
    """Guidance away from a worse version of the same model (smaller, or trained for less time):
    Karras et al. 2024 (arXiv:2406.02507).
    """

    good: Denoiser
    bad: Denoiser
    scale: GuidanceScale

    def __call__(self, x: Tensor, level: NoiseLevel, condition: Condition) -> Denoised:
        """Return bad + scale (good - bad), both under `condition`."""
        return _extrapolate(
            self.bad(x, level, condition), self.good(x, level, condition), self.scale, level
        )


@dataclass(frozen=True, kw_only=True)
class GuidanceInterval:
    """One denoiser (guided) for log-SNR in [low, high], another (plain) outside: Kynkäänniemi et
    al. 2024 (arXiv:2404.07724).

    For sampling, where a batch shares its level: only one of the two is called.
    """

    inside: Denoiser
    outside: Denoiser
    low: float = -float("inf")
    high: float = float("inf")

    def __call__(self, x: Tensor, level: NoiseLevel, condition: Condition) -> Denoised:
        """Call `inside` if the log-SNR of every level is in [low, high], else `outside`."""
        logsnr = level.logsnr()
        chosen = (
            self.inside
            if bool(((logsnr >= self.low) & (logsnr <= self.high)).all())
            else self.outside
        )
        return chosen(x, level, condition)


@dataclass(frozen=True, kw_only=True)
class ClampX0:
    """Clamp the guess of x0 to the data's range; eps follows, so that the pair still explains x."""

    denoiser: Denoiser
    low: float = -1.0
    high: float = 1.0

    def __call__(self, x: Tensor, level: NoiseLevel, condition: Condition) -> Denoised:
        """Return x0 clamped to [low, high], and the eps with which it explains `x`."""
        x0 = self.denoiser(x, level, condition).x0.clamp(self.low, self.high)
        return Sample().solve(x0, x, level)


@dataclass(frozen=True, kw_only=True)
class Inpaint:
    """The guess of x0 where nothing is known, the known image elsewhere; eps follows.

    Sampling with it fills holes.

    Attributes:
        image: (B, C, H, W), or (1, C, H, W) for all.
        known: 1 where the image is kept and 0 where it is generated, (B or 1, 1, H, W); shares
            between blend.
    """

    denoiser: Denoiser
    image: Tensor
    known: Tensor

    def __call__(self, x: Tensor, level: NoiseLevel, condition: Condition) -> Denoised:
        """Return x0 + known (image - x0), and the eps with which it explains `x`."""
        guess = self.denoiser(x, level, condition).x0
        return Sample().solve(
            torch.lerp(guess, self.image.to(guess), self.known.to(guess)), x, level
        )


@dataclass(frozen=True, kw_only=True)
class DynamicThresholding:
    """Dynamic thresholding: clamp x0 to a quantile of its own |x0|, at least 1, and rescale it to
    [-1, 1] (Saharia et al. 2022, arXiv:2205.11487).
    """

    denoiser: Denoiser
    quantile: float = 0.995

    def __call__(self, x: Tensor, level: NoiseLevel, condition: Condition) -> Denoised:
        """Return x0 clamped to +-s and divided by s, s = max(1, quantile of |x0|), and its eps."""
        x0 = self.denoiser(x, level, condition).x0
        limit = (
            torch.quantile(x0.flatten(1).abs().float(), self.quantile, dim=1)
            .clamp(min=1)
            .to(x0.dtype)
        )
        limit = limit.view(-1, *[1] * (x0.ndim - 1))
        return Sample().solve(torch.minimum(torch.maximum(x0, -limit), limit) / limit, x, level)
