"""Schedules: monotone maps from a time t in [0, 1] to a noise level, t = 0 data, t = 1 noise.

Training evaluates a schedule at random times, sampling on an even grid. So the noise schedule, the
training-time density, the inference grid, the timestep shift and Karras' rho are one type. A
posterior mean depends on the log-SNR alone: a network trained on one schedule samples on any other.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from sfumato.config import Extensible
from sfumato.config.bounds import (
    Finite,
    Fraction,
    FractionBelowOne,
    InnerFraction,
    NonNegative,
    Positive,
    Size,
)
from sfumato.diffusion.noise_level import NoiseLevel
from sfumato.errors import ScheduleError

HALF_PI = math.pi / 2
HINT = "its numbers must give finite levels whose share of noise never falls from t = 0 to t = 1"


class Schedule(Extensible, ABC):
    """A curve through the (alpha, sigma) quadrant whose log-SNR strictly falls with t.

    A dataclass derived from this class is a kind of schedule.
    """

    @abstractmethod
    def __call__(self, t: Tensor) -> NoiseLevel:
        """Return the levels at times `t` in [0, 1], any shape; use float64 for a sampling grid."""

    def at_size(self, height: int, width: int) -> Schedule:
        """Return the schedule for images, or latents, of this size; most do not depend on it."""
        return self


def require_schedule(schedule: Schedule, *, where: str) -> None:
    """Raise ScheduleError unless the levels are finite and lead from data to noise.

    At 65 even times, the log-SNR must never rise, and must be lower at the end than at the
    beginning.
    """
    try:
        alpha, sigma = schedule(torch.linspace(0, 1, 65, dtype=torch.float64))
    except (ArithmeticError, ValueError, LookupError, RuntimeError) as error:
        raise ScheduleError(f"{schedule} has no levels: {error}", where=where, hint=HINT) from None
    finite = bool(
        torch.isfinite(alpha).all()
        and torch.isfinite(sigma).all()
        and min(alpha.min(), sigma.min()) >= 0
    )
    if not (
        finite
        and (alpha[:-1] * sigma[1:] >= alpha[1:] * sigma[:-1]).all()
        and alpha[0] * sigma[-1] > alpha[-1] * sigma[0]
    ):
        raise ScheduleError(f"{schedule} does not lead from data to noise", where=where, hint=HINT)


def _variance_preserving(log_alpha: Tensor) -> NoiseLevel:
    """Return the level of unit variance with this log(alpha); exact for sigma near 0."""
    return NoiseLevel(torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha)))


def _variance_exploding(sigma: Tensor) -> NoiseLevel:
    return NoiseLevel(torch.ones_like(sigma), sigma)


@dataclass(frozen=True)
class Linear(Schedule):
    """The straight path of flow matching: alpha = 1 - t, sigma = t (Lipman et al. 2023,
    arXiv:2210.02747).
    """

    def __call__(self, t: Tensor) -> NoiseLevel:
        """Return alpha = 1 - t, sigma = t."""
        return NoiseLevel(1 - t, t)


@dataclass(frozen=True)
class Cosine(Schedule):
    """A quarter circle: alpha = cos(pi t/2), sigma = sin(pi t/2) (Nichol & Dhariwal 2021,
    arXiv:2102.09672, with s = 0).
    """

    def __call__(self, t: Tensor) -> NoiseLevel:
        """Return alpha = cos(pi t/2), sigma = sin(pi t/2)."""
        return NoiseLevel(torch.sin(HALF_PI * (1 - t)), torch.sin(HALF_PI * t))


@dataclass(frozen=True, kw_only=True)
class VariancePreserving(Schedule):
    """log alpha = -(beta_max - beta_min) t^2/4 - beta_min t/2, alpha^2 + sigma^2 = 1 (Song et al.
    2021, arXiv:2011.13456, eq. 33).

    Attributes:
        beta_min, beta_max: beta at t = 0 and at t = 1.
    """

    beta_min: NonNegative = 0.1
    beta_max: Positive = 20.0

    def __call__(self, t: Tensor) -> NoiseLevel:
        """Return the level with log alpha = -(beta_max - beta_min) t^2/4 - beta_min t/2."""
        return _variance_preserving(
            -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min
        )


@dataclass(frozen=True, kw_only=True)
class _DiscreteBetas:
    """A table of betas, read at any time: alpha at t = (i+1)/T is sqrt(prod_{j<=i} (1 - beta_j))
    exactly, log-linear in between.
    """

    beta_start: InnerFraction
    beta_end: InnerFraction
    steps: Size

    def betas(self) -> Tensor:
        """Return beta_0 ... beta_{T-1}, shape (steps,), float64."""
        raise NotImplementedError

    @cached_property
    def _log_alpha(self) -> Tensor:
        return torch.cat(
            [torch.zeros(1, dtype=torch.float64), 0.5 * torch.log1p(-self.betas()).cumsum(0)]
        )

    def __call__(self, t: Tensor) -> NoiseLevel:
        """Return the level whose log alpha is interpolated linearly in the table at `t`."""
        return _variance_preserving(_interpolate(self._log_alpha, t))


@dataclass(frozen=True, kw_only=True)
class LinearBetas(_DiscreteBetas, Schedule):
    """DDPM's schedule: betas evenly spaced (Ho et al. 2020, arXiv:2006.11239, sec. 4), any number
    of `steps`.

    Attributes:
        beta_start, beta_end: first and last beta.
        steps: number of discrete levels.
    """

    beta_start: InnerFraction = 1e-4
    beta_end: InnerFraction = 0.02
    steps: Size = 1000

    def betas(self) -> Tensor:
        """Return `steps` betas evenly spaced from `beta_start` to `beta_end`, float64."""
        return torch.linspace(self.beta_start, self.beta_end, self.steps, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class ScaledLinear(_DiscreteBetas, Schedule):
    """Stable Diffusion's schedule: square roots of the betas evenly spaced (Rombach et al. 2022,
    arXiv:2112.10752).

    Attributes:
        beta_start, beta_end: first and last beta.
        steps: number of discrete levels.
    """

    beta_start: InnerFraction = 0.00085
    beta_end: InnerFraction = 0.012
    steps: Size = 1000

    def betas(self) -> Tensor:
        """Return `steps` betas whose square roots are evenly spaced, float64."""
        return (
            torch.linspace(
                self.beta_start**0.5, self.beta_end**0.5, self.steps, dtype=torch.float64
            )
            ** 2
        )


@dataclass(frozen=True, kw_only=True)
class Sigmoid(Schedule):
    """alpha^2 falls along a sigmoid from `start` to `end` (Jabri et al. 2022, arXiv:2212.11972,
    algorithm 1).

    Attributes:
        start, end: range of the sigmoid that is used.
        temperature: width of the sigmoid.
    """

    start: Finite = -3.0
    end: Finite = 3.0
    temperature: Positive = 1.0

    def __call__(self, t: Tensor) -> NoiseLevel:
        """Return alpha^2 = (s(1) - s(t)) / (s(1) - s(0)), s the sigmoid from `start` to `end`."""

        def curve(time: Tensor) -> Tensor:
            return torch.sigmoid((time * (self.end - self.start) + self.start) / self.temperature)

        low, high = curve(torch.zeros_like(t)), curve(torch.ones_like(t))
        # Both squares are differences of the curve, so neither end loses digits to 1 - (1 - small).
        return NoiseLevel(
            torch.sqrt((high - curve(t)) / (high - low)),
            torch.sqrt((curve(t) - low) / (high - low)),
        )


@dataclass(frozen=True, kw_only=True)
class VarianceExploding(Schedule):
    """alpha = 1, sigma = sigma_min (sigma_max/sigma_min)^t (Song et al. 2021, arXiv:2011.13456, eq.
    31).

    Attributes:
        sigma_min, sigma_max: ends of the range of sigma.
    """

    sigma_min: Positive = 0.01
    sigma_max: Positive = 50.0

    def __call__(self, t: Tensor) -> NoiseLevel:
        """Return alpha = 1, sigma = sigma_min (sigma_max/sigma_min)^t."""
        return _variance_exploding(self.sigma_min * (self.sigma_max / self.sigma_min) ** t)


@dataclass(frozen=True, kw_only=True)
class Karras(Schedule):
    """alpha = 1, sigma^(1/rho) even in t (Karras et al. 2022, arXiv:2206.00364, eq. 5).

    Attributes:
        sigma_min, sigma_max: ends of the range of sigma.
        rho: exponent; larger values give more steps near sigma_min.
    """

    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0
    rho: Positive = 7.0

    def __call__(self, t: Tensor) -> NoiseLevel:
        """Return alpha = 1, sigma^(1/rho) linear in t from `sigma_min` to `sigma_max`."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return _variance_exploding((low + t * (high - low)) ** self.rho)


@dataclass(frozen=True, kw_only=True)
class LogNormal(Schedule):
    """alpha = 1, log sigma normal when t is uniform: EDM's training levels (Karras et al. 2022,
    arXiv:2206.00364, table 1).

    The outermost `tail` of each end is left out, so that every level is finite and above zero.

    Attributes:
        mean, std: of the normal distribution of log(sigma).
        tail: probability that is cut off at each end.
    """

    mean: Finite = -1.2
    std: Positive = 1.2
    tail: InnerFraction = 1e-6

    def __call__(self, t: Tensor) -> NoiseLevel:
        """Return alpha = 1, log sigma = mean + std Phi^-1(tail + (1 - 2 tail) t)."""
        # In float64: float32 rounds the upper tail by a twentieth of itself.
        quantile = torch.special.ndtri(self.tail + (1 - 2 * self.tail) * t.to(torch.float64)).to(
            t.dtype
        )
        return _variance_exploding(torch.exp(self.mean + self.std * quantile))


@dataclass(frozen=True, kw_only=True)
class UniformLogSNR(Schedule):
    """log-SNR falls evenly from `logsnr_max` to `logsnr_min`, alpha^2 + sigma^2 = 1 (Kingma et al.
    2021, arXiv:2107.00630).

    Attributes:
        logsnr_min, logsnr_max: ends of the range of log-SNR.
    """

    logsnr_min: Finite = -10.0
    logsnr_max: Finite = 10.0

    def __call__(self, t: Tensor) -> NoiseLevel:
        """Return alpha^2 = sigmoid(lambda), sigma^2 = sigmoid(-lambda), lambda linear in t."""
        logsnr = self.logsnr_max + t * (self.logsnr_min - self.logsnr_max)
        return NoiseLevel(torch.sqrt(torch.sigmoid(logsnr)), torch.sqrt(torch.sigmoid(-logsnr)))


@dataclass(frozen=True)
class Geometric(Schedule):
    """alpha = 1, sigma = sigma_max ratio^(steps (1 - t)): a grid of `steps` steps keeps the
    fraction `ratio` of the noise at each.

    DDIM on this grid is the loop "predict all the noise, subtract it, add `ratio` of it back".

    Attributes:
        ratio: of one level's sigma to the next.
        sigma_max: the largest sigma.
        steps: number of levels.
    """

    ratio: InnerFraction = 0.9
    _: KW_ONLY
    sigma_max: Positive = 80.0
    steps: Size = 100

    def __call__(self, t: Tensor) -> NoiseLevel:
        """Return alpha = 1, sigma = sigma_max ratio^(steps (1 - t))."""
        return _variance_exploding(self.sigma_max * self.ratio ** (self.steps * (1 - t)))


@dataclass(frozen=True, kw_only=True)
class Tabulated(Schedule):
    """Any curve, given as levels at evenly spaced times from t = 0 to t = 1, with straight lines in
    between.

    Attributes:
        alphas, sigmas: values at even times from t = 0 to t = 1.
    Raises:
        ScheduleError: if the tables differ in length, hold fewer than two levels, or their log-SNR
            does not strictly fall.
    """

    alphas: tuple[NonNegative, ...]
    sigmas: tuple[NonNegative, ...]

    def __post_init__(self) -> None:
        falling = len(self.alphas) == len(self.sigmas) >= 2 and all(
            a1 * s0 < a0 * s1
            for a0, a1, s0, s1 in zip(
                self.alphas, self.alphas[1:], self.sigmas, self.sigmas[1:], strict=False
            )
        )
        if not falling:
            raise ScheduleError(
                f"a table of {len(self.alphas)} alphas and {len(self.sigmas)} sigmas is not a "
                "schedule",
                where="Tabulated",
                hint="give as many sigmas as alphas, at least two, from data to noise, with "
                "alpha/sigma strictly falling",
            )

    def __call__(self, t: Tensor) -> NoiseLevel:
        """Return alpha and sigma interpolated linearly in their tables at `t`."""
        alphas, sigmas = (
            torch.tensor(table, dtype=torch.float64) for table in (self.alphas, self.sigmas)
        )
        return NoiseLevel(_interpolate(alphas, t), _interpolate(sigmas, t))


def _interpolate(table: Tensor, t: Tensor) -> Tensor:
    """Interpolate a table at even times linearly at `t`, in t's dtype and on its device."""
    position = t.to(torch.float64) * (len(table) - 1)
    index = position.floor().clamp(0, len(table) - 2).long()
    table = table.to(t.device)
    return torch.lerp(table[index], table[index + 1], position - index).to(t.dtype)


class Warp(Extensible, ABC):
    """A strictly increasing map of [0, 1] into itself.

    A dataclass derived from this class is a kind of warp.
    """

    @abstractmethod
    def __call__(self, t: Tensor) -> Tensor:
        """Return the warped times, of t's shape."""

    def at_size(self, height: int, width: int) -> Warp:
        """Return the warp for images, or latents, of this size; most do not depend on it."""
        return self


@dataclass(frozen=True)
class Shift(Warp):
    """t -> s t / (1 + (s - 1) t): log-SNR falls by 2 log s everywhere on the linear path (Esser et
    al. 2024, arXiv:2403.03206, eq. 23).

    Attributes:
        factor: above 1 for more noise, below 1 for less.
    """

    factor: Positive = 3.0

    def __call__(self, t: Tensor) -> Tensor:
        """Return s t / (1 + (s - 1) t), exact at both ends."""
        return t / (t + (1 - t) / self.factor)  # this form is exact at both ends


@dataclass(frozen=True, kw_only=True)
class ResolutionShift(Warp):
    """`Shift` by exp(mu), where mu is a linear function of the number of image tokens: the more of
    them, the more noise it takes to hide an image.

    Attributes:
        base_tokens, max_tokens: two numbers of tokens.
        base_mu, max_mu: mu at these numbers.
        patch_size: side of the cell of latents that is one token.
        tokens: the number that it is read at; `at_size` sets that of a size.
    Source: Esser et al. 2024 (arXiv:2403.03206), sec. 5.3.2; the linear function is FLUX.1's.
    """

    base_tokens: Size = 256
    max_tokens: Size = 4096
    base_mu: Finite = 0.5
    max_mu: Finite = 1.15
    patch_size: Size = 2
    tokens: Size = 4096

    def __post_init__(self) -> None:
        if self.base_tokens == self.max_tokens:
            raise ScheduleError(
                f"base_tokens = max_tokens = {self.max_tokens}",
                where="ResolutionShift",
                hint="give mu at two different numbers of tokens",
            )

    def __call__(self, t: Tensor) -> Tensor:
        """Return t / (t + (1 - t) exp(-mu)), exact at both ends."""
        slope = (self.max_mu - self.base_mu) / (self.max_tokens - self.base_tokens)
        return Shift(math.exp(self.base_mu + slope * (self.tokens - self.base_tokens)))(t)

    def at_size(self, height: int, width: int) -> ResolutionShift:
        """Return the shift for latents of this size."""
        rows, columns = -(-height // self.patch_size), -(-width // self.patch_size)
        return replace(self, tokens=rows * columns)


@dataclass(frozen=True, kw_only=True)
class LogitNormal(Warp):
    """t -> sigmoid(mean + std Phi^-1(t)): uniform times become logit-normal ones (Esser et al.
    2024, arXiv:2403.03206, eq. 19).

    Attributes:
        mean, std: of the normal distribution of logit(t); a higher mean gives more noise.
    """

    mean: Finite = 0.0
    std: Positive = 1.0

    def __call__(self, t: Tensor) -> Tensor:
        """Return sigmoid(mean + std Phi^-1(t))."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(t.to(torch.float64))).to(
            t.dtype
        )


@dataclass(frozen=True)
class Mode(Warp):
    """t -> t + s (t - sin^2(pi t/2)): more times in the middle for s > 0 (Esser et al. 2024,
    arXiv:2403.03206, eq. 20, t reversed).

    Attributes:
        scale: how much denser the middle is than the ends; negative for denser ends.
    Raises:
        ScheduleError: outside -1 <= scale <= 2/(pi - 2), where the map would fold back.
    """

    scale: Finite = 1.29

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise ScheduleError(
                f"scale = {self.scale} is outside [-1, {2 / (math.pi - 2):.3f}]", where="Mode"
            )

    def __call__(self, t: Tensor) -> Tensor:
        """Return t + s (t - sin^2(pi t/2))."""
        reverse = 1 - t
        return 1 - reverse - self.scale * (torch.cos(HALF_PI * reverse) ** 2 - 1 + reverse)


@dataclass(frozen=True, kw_only=True)
class Span(Warp):
    """t -> low + (high - low) t: a part of a schedule.

    Attributes:
        low, high: the part of [0, 1] that times are mapped to.
    """

    low: Fraction = 0.0
    high: Fraction = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ScheduleError(f"[{self.low}, {self.high}] is not within [0, 1]", where="Span")

    def __call__(self, t: Tensor) -> Tensor:
        """Return low + (high - low) t."""
        return self.low + (self.high - self.low) * t


@dataclass(frozen=True, kw_only=True)
class Warped(Schedule):
    """A schedule read at warped times: another density of training levels, or another spacing of
    the sampling grid.

    Attributes:
        schedule: the schedule that is read.
        warp: map of its times.
    """

    schedule: Schedule
    warp: Warp

    def __call__(self, t: Tensor) -> NoiseLevel:
        """Return the schedule's levels at the warped times."""
        return self.schedule(self.warp(t))

    def at_size(self, height: int, width: int) -> Warped:
        """Return both for images, or latents, of this size."""
        return replace(
            self,
            schedule=self.schedule.at_size(height, width),
            warp=self.warp.at_size(height, width),
        )


@dataclass(frozen=True)
class ZeroTerminalSNR(Schedule):
    """A variance-preserving schedule stretched so that t = 1 is pure noise: alpha' = (alpha -
    alpha_1) alpha_f/(alpha_f - alpha_1), f the fixed time.

    Attributes:
        schedule: the variance-preserving schedule that is stretched.
        fixed: the time whose level stays as it is; the first entry of a table of T levels is 1/T.
    Raises:
        ScheduleError: when called, if the schedule does not preserve variance.
    Source: Lin et al. 2024 (arXiv:2305.08891), algorithm 1.
    """

    schedule: Schedule
    fixed: FractionBelowOne = 0.0

    def __call__(self, t: Tensor) -> NoiseLevel:
        """Return the stretched alpha', at most 1, and sigma' = sqrt(1 - alpha'^2)."""
        ends = self.schedule(torch.tensor([self.fixed, 1.0], dtype=torch.float64))
        if not torch.allclose(torch.hypot(*ends), torch.ones(2, dtype=torch.float64)):
            raise ScheduleError(
                f"{type(self.schedule).__name__} does not preserve variance",
                where="ZeroTerminalSNR",
                hint="Linear and Cosine end at pure noise already; variance-exploding ones cannot",
            )
        first, last = ends.alpha.to(t)
        alpha = ((self.schedule(t).alpha - last) * first / (first - last)).clamp(max=1)
        return NoiseLevel(alpha, torch.sqrt(1 - alpha**2))
