"""A network as a denoiser: the one place where input scaling, the level's encoding and the 2x2
solve meet.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from sfumato.condition import NO_CONDITION, Condition
from sfumato.config.bounds import Positive, Size
from sfumato.diffusion.noise_level import Denoised, NoiseLevel
from sfumato.diffusion.parameterizations import Parameterization
from sfumato.diffusion.schedules import LinearBetas, Schedule

QUARTER_TURN = math.pi / 2 - 1e-9  # at which alpha is 0 but for rounding


class Denoiser(Protocol):
    """Anything that guesses clean data: networks, exact posteriors, guidance around either."""

    def __call__(self, x: Tensor, level: NoiseLevel, condition: Condition) -> Denoised:
        """Return the guess of x0 and eps in a noisy `x` (B, ...) at `level`, () or (B,)."""
        ...


class Network(Protocol):
    """What a network must be: it knows tensors and `Condition`, nothing of diffusion.

    It is called with x (B, ...) of about unit variance, `noise_input` (B,) from 0 (data) to 1
    (noise) and a condition, and returns a tensor of x's shape. With `Timestep`, `noise_input` is
    the index of a timestep instead.
    """

    def __call__(self, x: Tensor, noise_input: Tensor, condition: Condition) -> Tensor:
        """Return the prediction of the target, shape of `x`."""
        ...


@dataclass(frozen=True)
class UnitVariance:
    """Divide x by its own standard deviation, sqrt(alpha^2 sd^2 + sigma^2): the identity for
    variance-preserving levels at sd = 1.

    Attributes:
        sigma_data: standard deviation of the data.
    """

    sigma_data: Positive = 1.0

    def __call__(self, level: NoiseLevel) -> Tensor:
        """Return the factor 1 / sqrt(alpha^2 sd^2 + sigma^2), of the level's shape."""
        return torch.hypot(level.alpha * self.sigma_data, level.sigma).reciprocal()


@dataclass(frozen=True)
class UnitSum:
    """Divide x by alpha + sigma: the identity on the linear path, on which flow-matching networks
    from elsewhere were trained.
    """

    def __call__(self, level: NoiseLevel) -> Tensor:
        """Return the factor 1 / (alpha + sigma), of the level's shape."""
        return (level.alpha + level.sigma).reciprocal()


@dataclass(frozen=True)
class Angle:
    """The level as atan2(sigma, alpha) / (pi/2), from 0 (data) to 1 (noise): finite at both
    ends.
    """

    def __call__(self, level: NoiseLevel) -> Tensor:
        """Return atan2(sigma, alpha) / (pi/2), in [0, 1], of the level's shape."""
        return torch.atan2(level.sigma, level.alpha) * (2 / math.pi)


@dataclass(frozen=True)
class LogSNR:
    """The level as its log-SNR, clamped to +-limit and mapped to 0 (data) to 1 (noise); linear in
    EDM's log(sigma) where alpha = 1.

    Attributes:
        limit: log-SNR at which the input is clamped, on both sides.
    Source: Karras et al. 2022 (arXiv:2206.00364), table 1, up to the scale.
    """

    limit: Positive = 20.0

    def __call__(self, level: NoiseLevel) -> Tensor:
        """Return 1/2 - lambda / (2 limit), in [0, 1], lambda the log-SNR clamped to +-limit."""
        return 0.5 - level.logsnr().clamp(-self.limit, self.limit) / (2 * self.limit)


@dataclass(frozen=True)
class FlowTime:
    """The level as sigma / (alpha + sigma): t of the linear path, from 0 to 1."""

    def __call__(self, level: NoiseLevel) -> Tensor:
        """Return sigma / (alpha + sigma), in [0, 1], of the level's shape."""
        return level.sigma / (level.alpha + level.sigma)


@dataclass(frozen=True, kw_only=True)
class Timestep:
    """The level as the index of an entry in a table of T levels, 0 (data) to T - 1 (noise): what
    networks trained on discrete timesteps expect (DDPM, Stable Diffusion).

    Between two entries the index is linear in log(sigma / alpha), or in atan2(sigma, alpha) where
    that is infinite; beyond the table it is clamped.

    Attributes:
        schedule: entry i of the table is its level at t = (i + 1) / T.
        table_size: T.
    """

    schedule: Schedule = LinearBetas()
    table_size: Size = 1000

    @cached_property
    def _table(self) -> Tensor:
        """Angles of the entries, (T,), float64, rising."""
        times = torch.arange(1, self.table_size + 1, dtype=torch.float64) / self.table_size
        alpha, sigma = self.schedule(times)
        return torch.atan2(sigma, alpha)

    def __call__(self, level: NoiseLevel) -> Tensor:
        """Return the index of the level, in [0, T - 1], of the level's shape, in float64."""
        table = self._table.to(level.alpha.device)
        if len(table) == 1:
            return torch.zeros_like(level.alpha, dtype=torch.float64)
        angle = torch.atan2(level.sigma.to(torch.float64), level.alpha.to(torch.float64))
        angle = angle.clamp(table[0], table[-1])
        upper = torch.searchsorted(table, angle).clamp(1, len(table) - 1)
        below, above = table[upper - 1], table[upper]
        by_angle = (angle - below) / (above - below)
        log = torch.log(torch.tan(torch.stack([angle, below, above])))
        by_log = (log[0] - log[1]) / (log[2] - log[1])
        infinite = (below <= 0) | (above >= QUARTER_TURN)
        return upper - 1 + torch.where(infinite, by_angle, by_log)


NoiseInputConfig = Angle | LogSNR | FlowTime | Timestep
InputScaleConfig = UnitVariance | UnitSum


@dataclass(frozen=True, kw_only=True)
class NetworkDenoiser:
    """A network read as a denoiser of any schedule.

    Attributes:
        network: called as network(x, noise_input, condition); its output is the parameterization's
            target.
        parameterization: what the output means.
        input_scale: level -> factor on x, homogeneous of degree -1 so that the result depends on
            the log-SNR alone.
        noise_input: level -> the network's noise-level input, a function of the log-SNR from 0
            (data) to 1 (noise).
        compute_dtype: precision inside the network; x, the solve and the result stay in x's own.
    """

    network: Network
    parameterization: Parameterization
    input_scale: Callable[[NoiseLevel], Tensor] = UnitVariance()
    noise_input: Callable[[NoiseLevel], Tensor] = Angle()
    compute_dtype: torch.dtype = torch.float32

    def predict(self, x: Tensor, level: NoiseLevel, condition: Condition = NO_CONDITION) -> Tensor:
        """Return the network's output, its guess of the parameterization's target, shape of `x`."""
        noise_input = (
            self.noise_input(level).to(device=x.device, dtype=x.dtype).flatten().expand(len(x))
        )
        scaled = x * self.input_scale(level.like(x))
        with torch.autocast(
            x.device.type, dtype=self.compute_dtype, enabled=self.compute_dtype is not torch.float32
        ):
            output = self.network(scaled, noise_input, condition)
        # a network compiled for a GPU writes its next output to the same place
        return output.to(x.dtype, copy=True)

    def __call__(
        self, x: Tensor, level: NoiseLevel, condition: Condition = NO_CONDITION
    ) -> Denoised:
        """Return the guess of x0 and eps in a noisy `x` (B, ...) at `level`, () or (B,)."""
        return self.parameterization.solve(self.predict(x, level, condition), x, level)
