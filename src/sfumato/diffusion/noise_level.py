"""The two pairs in which everything is written: a noise level (alpha, sigma) and a denoised pair
(x0, eps).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


def broadcast(value: Tensor, x: Tensor) -> Tensor:
    """Reshape per-sample values (B,) to multiply `x` (B, ...), in its dtype and on its device.

    Values of other shapes are returned unchanged.
    """
    return value.to(x).view(-1, *[1] * (x.ndim - 1)) if value.ndim == 1 else value


class NoiseLevel(NamedTuple):
    """How much data and how much noise: x = alpha * x0 + sigma * eps.

    `alpha` and `sigma` are non-negative tensors of equal shape: () for one level, (B,) for one per
    sample, (steps + 1,) for a sampling grid, or anything that broadcasts. A level of shape () may
    stay on the host in float64: it multiplies tensors of any device and dtype, which keeps a
    solver's coefficients exact and off the device's critical path.
    """

    alpha: Tensor
    sigma: Tensor

    def logsnr(self) -> Tensor:
        """Return the log signal-to-noise ratio, lambda = 2 log(alpha / sigma).

        It is -inf at pure noise and +inf at clean data.
        """
        return 2 * (torch.log(self.alpha) - torch.log(self.sigma))

    def like(self, x: Tensor) -> NoiseLevel:
        """Reshape per-sample levels (B,) to broadcast against `x` (B, ...).

        The result is in the dtype and on the device of `x`.
        """
        return NoiseLevel(broadcast(self.alpha, x), broadcast(self.sigma, x))

    def mix(self, x0: Tensor, eps: Tensor) -> Tensor:
        """Return the noisy sample alpha * x0 + sigma * eps, shape of `x0`."""
        level = self.like(x0)
        return level.alpha * x0 + level.sigma * eps

    def at(self, index: int | slice) -> NoiseLevel:
        """Select one level, or a slice of levels, of a grid."""
        return NoiseLevel(self.alpha[index], self.sigma[index])

    def steps(self) -> Iterator[tuple[NoiseLevel, NoiseLevel]]:
        """Yield the (start, stop) pairs of a grid, noisiest first."""
        for i in range(len(self.alpha) - 1):
            yield self.at(i), self.at(i + 1)


class Denoised(NamedTuple):
    """A denoiser's guess of both x0 and eps in a noisy x, so that x = alpha * x0 + sigma * eps
    always holds.
    """

    x0: Tensor
    eps: Tensor
