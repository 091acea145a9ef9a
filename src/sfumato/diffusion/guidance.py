"""Guidance: denoisers made of denoisers. Its combinations are linear in any prediction, so they are
written once, on the denoised pair.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.condition import Condition
from sfumato.config import Extensible
from sfumato.config.bounds import Fraction
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.noise_level import Denoised, NoiseLevel, broadcast
from sfumato.diffusion.parameterizations import Parameterization, Sample

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
        return self.both(x, level, condition)[0]

    def both(self, x: Tensor, level: NoiseLevel, condition: Condition) -> tuple[Denoised, Denoised]:
        """Return the guided pair, and that of the requested condition alone."""
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
        return guided, target


class GuidanceRescale(Extensible, ABC):
    """A rule that gives guided predictions, which are larger than others, the size of unguided ones.

    A dataclass derived from this class is a kind of rescaling.
    """

    @abstractmethod
    def __call__(self, guided: Tensor, conditional: Tensor) -> Tensor:
        """Return the guided prediction, rescaled.

        Args:
            guided: what the network predicts, with guidance, (B, C, H, W).
            conditional: the same under the requested condition alone.
        """


@dataclass(frozen=True, kw_only=True)
class MatchDeviation(GuidanceRescale):
    """Give each image's prediction the standard deviation of the conditional one, in part:
    `guidance_rescale` in diffusers.

    Attributes:
        share: phi, from 0 (nothing is rescaled) to 1.
    Source: Lin et al. 2023 (arXiv:2305.08891), eq. 15-16.
    """

    kind: ClassVar[str] = "deviation"

    share: Fraction = 0.7

    def __call__(self, guided: Tensor, conditional: Tensor) -> Tensor:
        """Return guided (phi std(conditional) / std(guided) + 1 - phi)."""
        dims = tuple(range(1, guided.ndim))
        ratio = conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
        return guided * (self.share * ratio + (1 - self.share))


@dataclass(frozen=True, kw_only=True)
class MatchNorm(GuidanceRescale):
    """Give each part of the prediction the length of the same part of the conditional one.

    Attributes:
        parts: "rows" of each channel (Lumina 2), or "cells" of 2 x 2 latents with all channels
            (Qwen-Image).
    """

    kind: ClassVar[str] = "norm"

    parts: Literal["rows", "cells"] = "cells"

    def __call__(self, guided: Tensor, conditional: Tensor) -> Tensor:
        """Return guided |conditional| / |guided|, part by part."""
        square = _ROWS_OR_CELLS[self.parts]
        return guided * (square(conditional) / square(guided)).sqrt()


def _in_rows(x: Tensor) -> Tensor:
    """Return the squared length of each row, (B, C, H, 1)."""
    return x.square().sum(-1, keepdim=True)


def _in_cells(x: Tensor) -> Tensor:
    """Return the mean square of the cell that each place is in, (B, 1, H, W)."""
    means = F.avg_pool2d(x.square().sum(1, keepdim=True), 2, ceil_mode=True)
    return F.interpolate(means, scale_factor=2, mode="nearest")[..., : x.shape[2], : x.shape[3]]


_ROWS_OR_CELLS = {"rows": _in_rows, "cells": _in_cells}


@dataclass(frozen=True, kw_only=True)
class RescaledGuidance:
    """Guidance whose prediction is rescaled, as the network's own target.

    Attributes:
        guidance: what is rescaled.
        parameterization: the network's target.
        rescale: the rule.
    """

    guidance: ClassifierFree
    parameterization: Parameterization
    rescale: GuidanceRescale

    def __call__(self, x: Tensor, level: NoiseLevel, condition: Condition) -> Denoised:
        """Return the pair of the rescaled prediction."""
        target = self.parameterization.target
        both = self.guidance.both(x, level, condition)
        output = self.rescale(*(target(denoised, level) for denoised in both))
        return self.parameterization.solve(output, x, level)


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
