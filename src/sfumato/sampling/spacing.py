"""Spacings: where on a schedule the levels of a sampling grid lie."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sfumato.config import Extensible
from sfumato.config.bounds import CountOrZero, InnerFraction, Size
from sfumato.diffusion.noise_level import NoiseLevel
from sfumato.diffusion.parameterizations import Flow, ParameterizationConfig
from sfumato.diffusion.schedules import Schedule
from sfumato.errors import ScheduleError

CLEAN = NoiseLevel(torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))


class Spacing(Extensible, ABC):
    """A rule that picks the levels of a grid from a schedule.

    A dataclass derived from this class is a kind of spacing.
    """

    @abstractmethod
    def levels(self, schedule: Schedule, steps: int, *, strength: float) -> NoiseLevel:
        """Return `steps` levels (or fewer) and the last one, noisiest first, float64 on the host.

        Args:
            strength: how much of the way to pure noise the grid starts at, in (0, 1], and the share
                of the steps that it has.
        """


@dataclass(frozen=True)
class Even(Spacing):
    """Even times from `strength` to 0.

    A schedule that stops short of clean data (Karras, Geometric) reaches its t = 0 one step
    earlier, and the last step leads to clean data, as in EDM.
    """

    def levels(self, schedule: Schedule, steps: int, *, strength: float) -> NoiseLevel:
        """Return the levels at times strength (1 - k/n), k = 0 ... n."""
        steps = max(1, round(steps * strength))
        levels = schedule(torch.linspace(strength, 0, steps + 1, dtype=torch.float64))
        if levels.sigma[-1] == 0:
            return levels
        if steps == 1:
            return _with_clean_end(levels.at(slice(0, 1)))
        return _with_clean_end(schedule(torch.linspace(strength, 0, steps, dtype=torch.float64)))


@dataclass(frozen=True, kw_only=True)
class Leading(Spacing):
    """Every (T // n)-th entry of a table of T levels, counted from its clean end: "leading" in
    diffusers, the spacing of Stable Diffusion's folders.

    The noisiest entries of the table are not visited, so that sampling starts short of t = 1.

    Attributes:
        table_size: T; entry i of the table is the schedule at t = (i + 1) / T.
        offset: added to the index of each entry.
        end: the last level: clean data, or the first entry of the table.
    Source: Lin et al. 2024 (arXiv:2305.08891), table 2, which names the three spacings in use.
    """

    table_size: Size = 1000
    offset: CountOrZero = 0
    end: Literal["clean", "first"] = "clean"

    def levels(self, schedule: Schedule, steps: int, *, strength: float) -> NoiseLevel:
        """Return the levels of entries k (T // n) + offset, k = n - 1 ... 0, and the last one.

        Without an offset they reach the first entry already. If it is the end too, there is one
        step less: where diffusers steps from it to itself, nothing changes.

        Raises:
            ScheduleError: for more steps than the table has entries, or if no step is left.
        """
        if steps > self.table_size or self.offset >= self.table_size:
            raise ScheduleError(
                f"{steps} steps, offset {self.offset}, in a table of {self.table_size} levels",
                where="sampling.spacing",
                hint=f"take at most {self.table_size} steps",
            )
        count = max(1, round(steps * strength))
        entries = torch.arange(count - 1, -1, -1) * (self.table_size // steps) + self.offset
        entries = entries.clamp(max=self.table_size - 1).to(torch.float64)
        levels = schedule((entries + 1) / self.table_size)
        if self.end == "clean":
            return _joined(levels, CLEAN)
        if self.offset == 0:
            if count == 1:
                raise ScheduleError(
                    "one step would begin where it ends, at the first entry of the table",
                    where="sampling.steps",
                    hint="take more steps, or more strength",
                )
            return levels
        return _joined(levels, schedule(torch.tensor([1 / self.table_size], dtype=torch.float64)))


@dataclass(frozen=True, kw_only=True)
class Linspace(Spacing):
    """Even times from 1 to `last`, then clean data: the spacing of diffusers' Euler and
    flow-matching schedulers.

    Attributes:
        last: time of the last noisy level; 1/T is the first entry of a table of T levels.
    """

    last: InnerFraction = 1e-3

    def levels(self, schedule: Schedule, steps: int, *, strength: float) -> NoiseLevel:
        """Return the levels at `steps` even times from 1 to `last`, and clean data."""
        count = max(1, round(steps * strength))
        times = torch.linspace(1, self.last, steps, dtype=torch.float64)
        return _joined(schedule(times[-count:]), CLEAN)


@dataclass(frozen=True, kw_only=True)
class RoundedLinspace(Spacing):
    """Even entries of a table of T levels, rounded, from its noisiest one on, with clean data in
    the place of entry 0: "linspace" in diffusers' DPM-Solver.

    Attributes:
        table_size: T; entry i of the table is the schedule at t = (i + 1) / T.
    """

    table_size: Size = 1000

    def levels(self, schedule: Schedule, steps: int, *, strength: float) -> NoiseLevel:
        """Return the levels of `steps` rounded entries from T - 1 down, and clean data."""
        count = max(1, round(steps * strength))
        entries = torch.linspace(self.table_size - 1, 0, steps + 1, dtype=torch.float64).round()
        return _joined(schedule((entries[:-1][-count:] + 1) / self.table_size), CLEAN)


@dataclass(frozen=True, kw_only=True)
class Trailing(Spacing):
    """Even entries of a table of T levels, rounded, counted from its noisiest one, then clean data:
    "trailing" in diffusers. It is `Even` where the steps divide T.

    Attributes:
        table_size: T; entry i of the table is the schedule at t = (i + 1) / T.
    Source: Lin et al. 2024 (arXiv:2305.08891), table 2.
    """

    table_size: Size = 1000

    def levels(self, schedule: Schedule, steps: int, *, strength: float) -> NoiseLevel:
        """Return the levels of entries T - k T/n - 1, k = 0 ... n - 1, rounded, and clean data."""
        count = max(1, round(steps * strength))
        size = self.table_size
        stride = size - (size - size / steps)  # as numpy.arange computes it: ties then round alike
        times = (size - torch.arange(steps, dtype=torch.float64) * stride).round() / size
        return _joined(schedule(times[-count:]), CLEAN)


@dataclass(frozen=True, kw_only=True)
class Terminal(Spacing):
    """The levels of another spacing, their shares of data stretched so that the last noisy level has
    a given share of noise: `shift_terminal` in diffusers, for the linear path.

    Attributes:
        spacing: what is stretched.
        noise: share of noise of the last noisy level, sigma / (alpha + sigma).
    """

    spacing: Spacing = Even()
    noise: InnerFraction = 0.02

    def levels(self, schedule: Schedule, steps: int, *, strength: float) -> NoiseLevel:
        """Return alpha' = alpha (1 - noise) / alpha_last, sigma' = 1 - alpha', and clean data."""
        data = 1 - Flow().coordinate(self.spacing.levels(schedule, steps, strength=1.0))[:-1]
        data = data * (1 - self.noise) / data[-1] if data[-1] > 0 else data
        count = max(1, round(steps * strength))
        return _joined(Flow().level(1 - data[-count:]), CLEAN)


@dataclass(frozen=True, kw_only=True)
class BetweenEnds(Spacing):
    """As many levels as another spacing has, between the ends of its noisy levels, then clean data:
    `use_karras_sigmas` and its likes in diffusers.

    Attributes:
        spacing: where the ends come from.
        rule: what is even: "karras" c^(1/7), "exponential" log c, or "beta", quantiles of the beta
            distribution with both parameters 0.6.
        coordinate: c as a function of the level: sigma/(alpha + sigma) is `Flow`, sigma/alpha is
            `Epsilon`.
    Source: Karras et al. 2022 (arXiv:2206.00364), eq. 5; Lee et al. 2024 (arXiv:2407.12173).
    """

    spacing: Spacing = Even()
    rule: Literal["karras", "exponential", "beta"] = "karras"
    coordinate: ParameterizationConfig = Flow()

    def levels(self, schedule: Schedule, steps: int, *, strength: float) -> NoiseLevel:
        """Return the levels at coordinates that the rule spreads from the first to the last.

        Raises:
            ScheduleError: if the first coordinate is infinite.
        """
        noisy = self.spacing.levels(schedule, steps, strength=1.0).at(slice(0, -1))
        ends = self.coordinate.finite_coordinate(noisy)
        count = max(1, round(steps * strength))
        levels = self.coordinate.level(_RULES[self.rule](ends[0], ends[-1], len(ends))[-count:])
        return _joined(levels, CLEAN)


def _karras(first: Tensor, last: Tensor, count: int) -> Tensor:
    rho = 7.0
    first, last = first ** (1 / rho), last ** (1 / rho)
    return (first + _ramp(count) * (last - first)) ** rho


def _exponential(first: Tensor, last: Tensor, count: int) -> Tensor:
    first, last = first.log(), last.log()
    return (first + _ramp(count) * (last - first)).exp()


def _beta(first: Tensor, last: Tensor, count: int) -> Tensor:
    from scipy.stats import beta

    quantiles = torch.from_numpy(beta.ppf(1 - _ramp(count).numpy(), 0.6, 0.6))
    return last + quantiles * (first - last)


def _ramp(count: int) -> Tensor:
    return torch.linspace(0, 1, count, dtype=torch.float64)


_RULES = {"karras": _karras, "exponential": _exponential, "beta": _beta}


def _with_clean_end(levels: NoiseLevel) -> NoiseLevel:
    """Append clean data at the scale of the last level."""
    return _joined(levels, NoiseLevel(levels.alpha[-1:], torch.zeros(1, dtype=torch.float64)))


def _joined(levels: NoiseLevel, last: NoiseLevel) -> NoiseLevel:
    return NoiseLevel(torch.cat([levels.alpha, last.alpha]), torch.cat([levels.sigma, last.sigma]))
