"""What a network predicts and the coordinate in which a solver integrates: one object, defined by a
scale and a coordinate.

Along the path x = alpha*x0 + sigma*eps the tangent d(x/k)/dc is a combination T = a*x0 + b*eps. T
is the network's target, and dy/dc = T with y = x/k is the sampling ODE. Everything else (recovering
x0 and eps, converting losses) is written once, below. No other module divides a prediction by alpha
or sigma.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sfumato.config.bounds import Positive
from sfumato.diffusion.noise_level import Denoised, NoiseLevel
from sfumato.errors import ScheduleError


class Parameterization(ABC):
    """A target T = a*x0 + b*eps, with the scale k and the coordinate c whose tangent it is."""

    @abstractmethod
    def scale(self, level: NoiseLevel) -> Tensor:
        """Return k(level), homogeneous of degree 1 in (alpha, sigma)."""

    @abstractmethod
    def coordinate(self, level: NoiseLevel) -> Tensor:
        """Return c(level), a monotone function of the log-SNR alone."""

    @abstractmethod
    def level(self, coordinate: Tensor) -> NoiseLevel:
        """Return the level of unit scale, k = 1, that has this coordinate."""

    @abstractmethod
    def tangent(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Return (a, b) = d(alpha/k, sigma/k)/dc."""

    @final
    def finite_coordinate(self, level: NoiseLevel) -> Tensor:
        """Return c(level), for solvers that integrate in it.

        Raises:
            ScheduleError: where it is infinite: `Epsilon` at alpha = 0, `Sample` at sigma = 0.
        """
        coordinate = self.coordinate(level)
        if not bool(torch.isfinite(coordinate).all()):
            raise ScheduleError(
                f"no solver can integrate in the coordinate of {type(self).__name__} from or to "
                "a level where it is infinite",
                where="sampler",
                hint="use parameterization=Flow() or Velocity(), or avoid that end: "
                "Warped(schedule=..., warp=Span(high=0.999))",
            )
        return coordinate

    @final
    def determinant(self, level: NoiseLevel) -> Tensor:
        """Return D = a*sigma - b*alpha.

        |T^ - T| = |D/sigma| |x0^ - x0| = |D/alpha| |eps^ - eps|.
        """
        a, b = self.tangent(level)
        return a * level.sigma - b * level.alpha

    @final
    def target(self, denoised: Denoised, level: NoiseLevel) -> Tensor:
        """Return T = a*x0 + b*eps, shape of x0."""
        a, b = self.tangent(level.like(denoised.x0))
        return a * denoised.x0 + b * denoised.eps

    @final
    def solve(self, output: Tensor, x: Tensor, level: NoiseLevel) -> Denoised:
        """Recover x0 = (sigma*T - b*x)/D and eps = (a*x - alpha*T)/D from a prediction T.

        Args:
            output: the prediction T, shape (B, ...).
            x: the noisy sample at `level`, same shape.
        Raises:
            ScheduleError: where D = 0: `Epsilon` at alpha = 0 (pure noise), `Sample` at sigma = 0
                (clean data).
        """
        level = level.like(x)
        a, b = self.tangent(level)
        determinant = a * level.sigma - b * level.alpha
        if bool((determinant == 0).any()):
            raise ScheduleError(
                f"{type(self).__name__} cannot recover x0 and eps where its prediction holds "
                "only one of them "
                "(Epsilon at alpha = 0, Sample at sigma = 0)",
                where="Parameterization.solve",
                hint="predict Velocity or Flow, or avoid that end, e.g. "
                "Warped(schedule=schedule, warp=Span(high=0.999))",
            )
        return Denoised(
            x0=(level.sigma * output - b * x) / determinant,
            eps=(a * x - level.alpha * output) / determinant,
        )


@dataclass(frozen=True)
class Epsilon(Parameterization):
    """The noise: k = alpha, c = sigma/alpha, T = eps. Undefined at alpha = 0.

    Source: Ho et al. 2020 (arXiv:2006.11239), eq. 14; the coordinate is Karras et al. 2022's sigma
        (arXiv:2206.00364).
    """

    def scale(self, level: NoiseLevel) -> Tensor:
        """Return k = alpha."""
        return level.alpha

    def coordinate(self, level: NoiseLevel) -> Tensor:
        """Return c = sigma / alpha, infinite at alpha = 0."""
        return level.sigma / level.alpha

    def level(self, coordinate: Tensor) -> NoiseLevel:
        """Return (alpha, sigma) = (1, c)."""
        return NoiseLevel(torch.ones_like(coordinate), coordinate)

    def tangent(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Return (a, b) = (0, 1): T = eps."""
        return torch.zeros_like(level.alpha), torch.ones_like(level.sigma)


@dataclass(frozen=True)
class Sample(Parameterization):
    """The clean image: k = sigma, c = alpha/sigma, T = x0. Undefined at sigma = 0.

    Source: Salimans & Ho 2022 (arXiv:2202.00512), sec. 4; the coordinate is that of Lu et al. 2022
        (arXiv:2211.01095).
    """

    def scale(self, level: NoiseLevel) -> Tensor:
        """Return k = sigma."""
        return level.sigma

    def coordinate(self, level: NoiseLevel) -> Tensor:
        """Return c = alpha / sigma, infinite at sigma = 0."""
        return level.alpha / level.sigma

    def level(self, coordinate: Tensor) -> NoiseLevel:
        """Return (alpha, sigma) = (c, 1)."""
        return NoiseLevel(coordinate, torch.ones_like(coordinate))

    def tangent(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Return (a, b) = (1, 0): T = x0."""
        return torch.ones_like(level.alpha), torch.zeros_like(level.sigma)


@dataclass(frozen=True)
class Flow(Parameterization):
    """The straight-line velocity eps - x0: k = alpha + sigma, c = sigma/(alpha + sigma).

    Source: Lipman et al. 2023 (arXiv:2210.02747); Liu et al. 2023 (arXiv:2209.03003).
    """

    def scale(self, level: NoiseLevel) -> Tensor:
        """Return k = alpha + sigma."""
        return level.alpha + level.sigma

    def coordinate(self, level: NoiseLevel) -> Tensor:
        """Return c = sigma / (alpha + sigma), in [0, 1]."""
        return level.sigma / (level.alpha + level.sigma)

    def level(self, coordinate: Tensor) -> NoiseLevel:
        """Return (alpha, sigma) = (1 - c, c)."""
        return NoiseLevel(1 - coordinate, coordinate)

    def tangent(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Return (a, b) = (-1, 1): T = eps - x0."""
        return -torch.ones_like(level.alpha), torch.ones_like(level.sigma)


@dataclass(frozen=True)
class Velocity(Parameterization):
    """The rotation's velocity: k = sqrt(alpha^2 sd^2 + sigma^2), c = atan2(sigma, alpha sd), T =
    (-sigma/sd x0 + alpha sd eps)/k.

    `Velocity(1)` is Salimans & Ho's v. With the data's standard deviation as `sigma_data` it is
    EDM's preconditioning: EDM's network output is -T, and its c_skip and c_out are what `solve`
    computes.

    Attributes:
        sigma_data: standard deviation of the data.
    Source: Salimans & Ho 2022 (arXiv:2202.00512), appendix D; Karras et al. 2022
        (arXiv:2206.00364), table 1.
    """

    sigma_data: Positive = 1.0

    def scale(self, level: NoiseLevel) -> Tensor:
        """Return k = sqrt(alpha^2 sd^2 + sigma^2)."""
        return torch.hypot(level.alpha * self.sigma_data, level.sigma)

    def coordinate(self, level: NoiseLevel) -> Tensor:
        """Return c = atan2(sigma, alpha sd), in [0, pi/2]."""
        return torch.atan2(level.sigma, level.alpha * self.sigma_data)

    def level(self, coordinate: Tensor) -> NoiseLevel:
        """Return (alpha, sigma) = (cos(c) / sd, sin(c))."""
        return NoiseLevel(torch.cos(coordinate) / self.sigma_data, torch.sin(coordinate))

    def tangent(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Return (a, b) = (-sigma / (sd k), alpha sd / k)."""
        scale = self.scale(level)
        return -level.sigma / (self.sigma_data * scale), level.alpha * self.sigma_data / scale


ParameterizationConfig = Epsilon | Sample | Flow | Velocity
