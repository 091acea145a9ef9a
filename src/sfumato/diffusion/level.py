"""The two pairs everything is written in: a noise level (alpha, sigma) and a denoised pair (x0,
eps).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


def broadcast(value: Tensor, x: Tensor) -> Tensor:
    """Shape per-sample values (B,) so that they multiply `x` (B, ...), in its dtype and on its
    device; others stay as they are.
    """
    return value.to(x).view(-1, *[1] * (x.ndim - 1)) if value.ndim == 1 else value


class NoiseLevel(NamedTuple):
    """How much data and how much noise: x = alpha * x0 + sigma * eps.

    `alpha` and `sigma` are non-negative tensors of equal shape: () for one level, (B,) for one per
    sample, (steps + 1,) for a
    sampling grid, or anything that broadcasts. A level of shape () may stay on the host in float64:
    it multiplies tensors of
    any device and dtype, which keeps a solver's coefficients exact and off the device's critical
    path.
    """

    alpha: Tensor
    sigma: Tensor

    def logsnr(self) -> Tensor:
        """Log signal-to-noise ratio, lambda = 2 log(alpha / sigma); -inf at pure noise, +inf at
        clean data.
        """
        return 2 * (torch.log(self.alpha) - torch.log(self.sigma))

    def like(self, x: Tensor) -> NoiseLevel:
        """Shape per-sample levels (B,) so that they broadcast against `x` (B, ...), in its dtype
        and on its device.
        """
        return NoiseLevel(broadcast(self.alpha, x), broadcast(self.sigma, x))

    def mix(self, x0: Tensor, eps: Tensor) -> Tensor:
        """The noisy sample alpha * x0 + sigma * eps, shape of `x0`."""
        level = self.like(x0)
        return level.alpha * x0 + level.sigma * eps

    def at(self, index: int | slice) -> NoiseLevel:
        """One level, or a run of levels, of a grid."""
        return NoiseLevel(self.alpha[index], self.sigma[index])

    def steps(self) -> Iterator[tuple[NoiseLevel, NoiseLevel]]:
        """The (start, stop) pairs of a grid, noisiest first."""
        for i in range(len(self.alpha) - 1):
            yield self.at(i), self.at(i + 1)


class Denoised(NamedTuple):
    """What a denoiser says of a noisy x at a level: both halves, so that x = alpha * x0 + sigma *
    eps always holds.
    """

    x0: Tensor
    eps: Tensor
