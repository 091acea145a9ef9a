"""The interface of samplers, and what they receive."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol

from torch import Tensor

from sfumato.diffusion.noise_level import Denoised, NoiseLevel


class Denoise(Protocol):
    """A denoiser whose condition is fixed."""

    def __call__(self, x: Tensor, level: NoiseLevel) -> Denoised:
        """Return the guess of x0 and eps in a noisy `x` (B, ...) at `level`."""
        ...


class Noise(Protocol):
    """Fresh standard normal noise in the shape, dtype and device of `x`."""

    def __call__(self, x: Tensor) -> Tensor:
        """Draw noise, independent of all earlier draws."""
        ...


class Point(NamedTuple):
    """An evaluation that multistep samplers remember: the level, the parameterization's T there,
    and y = x/k.
    """

    level: NoiseLevel
    target: Tensor
    y: Tensor


History = deque[Point]


class Sampler(Protocol):
    """One step of a solver; frozen and stateless: what must be remembered goes into `history`."""

    @property
    def order(self) -> int:
        """Global order of accuracy on the probability-flow ODE, given exact starting values."""
        ...

    def step(
        self,
        denoise: Denoise,
        x: Tensor,
        start: NoiseLevel,
        stop: NoiseLevel,
        history: History,
        noise: Noise,
    ) -> Tensor:
        """Advance a sample from level `start` to the less noisy level `stop`.

        Args:
            x: noisy sample at `start`, shape (B, ...).
            start, stop: levels with start.logsnr() < stop.logsnr(), and sigma > 0 at both (the loop
                takes the step onto clean data).
            history: earlier evaluations of this trajectory, newest first.
            noise: called once for each draw that a stochastic sampler needs.
        """
        ...
