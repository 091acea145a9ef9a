"""Noise for sampling that depends only on (seed, image index, draw)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sfumato import randomness


@dataclass
class KeyedNoise:
    """Successive draws for images `first`, `first + 1`, ...: image i gets the same noise in any
    batch.

    Draw 0 is meant for the start of the trajectory, the others for a stochastic sampler's steps.
    """

    seed: int
    first: int = 0
    draws: int = field(default=0, init=False)

    def __call__(self, x: Tensor) -> Tensor:
        """Draw standard normal noise in the shape, dtype and on the device of `x` (B, ...)."""
        noise = randomness.normal(
            self.seed, f"sample/{self.draws}", first=self.first, shape=tuple(x.shape)
        )
        self.draws += 1
        return noise.to(x)


@dataclass(frozen=True)
class InterpolatedNoise:
    """For each draw, noise on the way from the first image of one `KeyedNoise` to that of another,
    at `shares` of the way.
    """

    first: KeyedNoise
    last: KeyedNoise
    shares: Sequence[float]

    def __call__(self, x: Tensor) -> Tensor:
        """Draw noise in the shape, dtype and on the device of `x` (B, ...), B = len(shares)."""
        a, b = self.first(x[:1]), self.last(x[:1])
        return torch.cat([slerp(a, b, share) for share in self.shares])


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Interpolate spherically from noise `a` to `b`; the variance stays the same."""
    angle = torch.arccos((torch.sum(a * b) / (a.norm() * b.norm())).clamp(-1, 1))
    if angle < 1e-4:
        return a
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)
