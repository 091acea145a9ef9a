"""Noise for sampling that depends on (seed, image index, draw) only."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from sfumato import randomness


@dataclass
class KeyedNoise:
    """Successive draws for images `first`, `first + 1`, ...: image i gets the same noise in any batch.

    Draw 0 is meant for the start of the trajectory, the rest for a stochastic sampler's steps.
    """

    seed: int
    first: int = 0
    draws: int = field(default=0, init=False)

    def __call__(self, x: Tensor) -> Tensor:
        """Standard normal noise in the shape, dtype and on the device of `x` (B, ...)."""
        noise = randomness.normal(self.seed, f"sample/{self.draws}", first=self.first, shape=tuple(x.shape))
        self.draws += 1
        return noise.to(x)
