"""What a sweep compares, and how much of it fits into a given time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import astuple
from typing import NamedTuple

from sfumato.evaluation.sweep_result import Setting

FIRST, SECOND = 64, 256  # samples of each setting in the rounds of the selection
NUMBERS = 2 * SECOND  # of samples; the second half decides
KEPT = 1 / 4  # of the settings
WIDTHS = (0.05, 0.1, 0.2)  # of reconstructed averages
STRENGTHS = (0.0, 0.5, 1.0, 2.0)  # of guidance: guidance - 1, over that of the run's own
UNGUIDED_STRENGTH = 1.0  # that stands for the run's own where this is without guidance


def settings_around(own: Setting, *, guidable: bool, widths: Sequence[float]) -> list[Setting]:
    """Return the grid of settings around the run's own, which comes first.

    Args:
        guidable: whether guidance has an effect, and what it leads away from was trained.
        widths: of averages that can be reconstructed instead of the run's own weights.
    """
    strength = own.guidance - 1 or UNGUIDED_STRENGTH
    scales = [round(1 + strength * part, 3) for part in STRENGTHS] if guidable else []
    combinations = itertools.product(
        (own.weights, *widths),
        dict.fromkeys((own.guidance, *scales)),
        dict.fromkeys((own.steps, max(1, own.steps // 2))),
    )
    return [
        Setting(weights=weights, guidance=guidance, steps=steps)
        for weights, guidance, steps in combinations
    ]


class Price(NamedTuple):
    """Seconds of one call of the network for one sample, and of judging a sample."""

    call_s: float
    read_s: float

    def of(self, setting: Setting, count: int) -> float:
        """Return the seconds of some samples of a setting."""
        return count * (setting.calls * self.call_s + self.read_s)


class Plan(NamedTuple):
    """Which settings are compared, the run's own first, and by how many samples."""

    settings: Sequence[Setting]
    first: int
    second: int

    @property
    def promoted(self) -> int:
        """How many settings enter the second round, besides the run's own."""
        return max(1, math.ceil(KEPT * len(self.settings)))

    def decision_s(self, price: Price) -> float:
        """Return the most seconds that the decision can take."""
        dearest = max(self.settings, key=lambda setting: setting.calls)
        return price.of(self.settings[0], self.second) + 2 * price.of(dearest, self.second)

    def seconds(self, price: Price) -> float:
        """Return the most seconds that all can take."""
        dear = sorted(self.settings, key=lambda setting: -setting.calls)[: self.promoted]
        first = sum(price.of(setting, self.first) for setting in self.settings)
        more = self.second - self.first
        second = sum(price.of(setting, more) for setting in (self.settings[0], *dear))
        return first + second + self.decision_s(price)


def plans(grid: Sequence[Setting]) -> list[Plan]:
    """Return plans for a grid of settings, the run's own first, from the dearest to the cheapest."""
    own = grid[0]
    star = [
        setting
        for setting in grid
        if sum(a != b for a, b in zip(astuple(setting), astuple(own), strict=True)) <= 1
    ]
    return [
        Plan(grid, FIRST, SECOND),
        Plan(star, FIRST, SECOND),
        Plan(star, FIRST, SECOND // 2),
        Plan(star, FIRST // 2, SECOND // 4),
    ]
