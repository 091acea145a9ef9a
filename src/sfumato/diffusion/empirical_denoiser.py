"""The exact denoiser of a finite set of images: what a network would become if it memorized them
perfectly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.condition import NO_CONDITION, Condition
from sfumato.diffusion.noise_level import Denoised, NoiseLevel
from sfumato.diffusion.parameterizations import Sample


@dataclass(frozen=True)
class EmpiricalDenoiser:
    """E[x0 | x] when x0 is one of `data` (N, ...), all equally likely: a softmax over squared
    distances.

    Sampling with it returns images of the set. It explains, tests and bounds; it is not a model.

    Source: Karras et al. 2022 (arXiv:2206.00364), appendix B.3.
    """

    data: Tensor

    def __call__(
        self, x: Tensor, level: NoiseLevel, condition: Condition = NO_CONDITION
    ) -> Denoised:
        """Return the posterior mean of x0, and eps to match, for x (B, ...) at sigma > 0."""
        flat, data = x.flatten(1), self.data.flatten(1).to(x)
        shaped = level.like(flat)
        # |x - alpha d|^2 without the |x|^2 that all terms share
        distance = (shaped.alpha * data.square().sum(1)[None] - 2 * flat @ data.T) * shaped.alpha
        weights = torch.softmax(-distance / (2 * shaped.sigma**2), dim=1)
        return Sample().solve((weights.to(data) @ data).view_as(x), x, level)
