"""The final sweep: which weights, guidance and number of steps give samples nearest to held-out
images, as far as noise lets that be said.

All settings share noise and conditions. A first round draws few samples of each setting, a second
more of the best quarter; both only select. The decision is made on noise and conditions that the
selection did not use, so that choosing the best of many does not make it look better than it is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from torch import Tensor

from sfumato.errors import NonFiniteError, RunError
from sfumato.evaluation.distances import DistanceEstimate
from sfumato.evaluation.sweep_judge import Judge, Samples
from sfumato.evaluation.sweep_plan import FIRST, SECOND, Plan, Price, plans
from sfumato.evaluation.sweep_result import Setting, SettingRow, SweepResult, reason_for

Draw = Callable[[Setting, range], Tensor]  # images (n, C, H, W) in [0, 1] with these numbers
AT_ONCE = 64  # samples of each setting of the decision, between looks at the clock
PROBES = (2, 8, 16, 32, FIRST)  # samples of the run's own setting, from which the time is estimated
PROBE_SHARE = 0.2  # of the time, at most, that they may take

SPARE = 1.2  # times the time needed, which is what is suggested


class Sweep:
    """One comparison of settings within some seconds.

    Args:
        grid: the settings, the run's own first.
        draw: generates samples.
        seconds: that everything may take.
        step: of the weights.
        clock: the time in seconds.
        on_progress: called with the fraction of the time that has passed, and the current part.
    """

    def __init__(
        self,
        grid: Sequence[Setting],
        draw: Draw,
        judge: Judge,
        *,
        seconds: float,
        step: int,
        clock: Callable[[], float] = time.perf_counter,
        on_progress: Callable[[float, str], None] = lambda fraction, text: None,
    ) -> None:
        self.grid, self.own, self.step = grid, grid[0], step
        self._draw, self._judge, self._clock, self._progress = draw, judge, clock, on_progress
        self._begun, self._seconds = clock(), seconds
        self._drawn: dict[Setting, Samples] = {}
        self._remarks: list[str] = []

    def run(self) -> SweepResult:
        """Compare the settings.

        Raises:
            RunError: if the time does not suffice for the cheapest plan.
        """
        plan, price = self._plan()
        selected = self._select(plan, price)
        rows = self._all_rows()
        own = next(row for row in selected if row.setting == self.own)
        ahead = [row for row in selected if not row.out]
        final: list[SettingRow] = []
        recommended: SettingRow | None = None
        if own.out:
            sentence = (
                f"the run's own setting ({self.own}) copies training images, so that distances say "
                "nothing: no setting is recommended"
            )
        elif ahead[0].setting == self.own:
            sentence = f"no setting came out ahead of the run's own ({self.own}), which stays"
        else:
            final, worse = self._decide(plan, ahead)
            recommended = _winner(final, worse)
            sentence = self._sentence(final, recommended)
        self._progress(1.0, "done")
        return SweepResult(
            step=self.step,
            own=self.own,
            recommended=None if recommended is None else recommended.setting,
            sentence=sentence,
            reason="" if recommended is None else reason_for(final[0], recommended),
            remarks=self._remarks,
            rows=rows,
            final=final,
            seconds=self._clock() - self._begun,
        )

    def _plan(self) -> tuple[Plan, Price]:
        """Return the dearest plan that fits into the time, and the price of a sample."""
        price = self._probe()
        left = self._seconds - (self._clock() - self._begun)
        known = price.of(self.own, len(self._drawn[self.own]))
        choices = plans(self.grid)
        plan = next((plan for plan in choices if plan.seconds(price) - known <= left), None)
        if plan is None:
            needed = choices[-1].seconds(price) - known + self._seconds - left
            raise RunError(
                f"{self._seconds / 60:.2g} minutes are too few to compare settings of sampling: a "
                f"sample takes {price.of(self.own, 1):.2g} s",
                where="sweep",
                hint=f"sfumato sweep RUN --minutes {math.ceil(5 * SPARE * needed / 60) / 5:g} may do",
            )
        whole = choices[0]
        if len(plan.settings) < len(whole.settings):
            self._remarks.append(
                f"{len(plan.settings)} of {len(whole.settings)} settings are compared, those that "
                f"differ from the run's own in one thing: all would take about "
                f"{whole.seconds(price) / 60:.2g} minutes"
            )
        if (plan.first, plan.second) != (whole.first, whole.second):
            self._remarks.append(
                f"{plan.first} and {plan.second} samples instead of {whole.first} and "
                f"{whole.second} fit into the time"
            )
        return plan, price

    def _probe(self) -> Price:
        """Draw the first samples of the run's own setting, and return the price of a sample.

        The first ones take longer than others, as everything is used for the first time.
        """
        price = Price(0.0, 0.0)
        for count in PROBES:
            begun, have = self._clock(), len(self._drawn.get(self.own, ()))
            images = self._draw(self.own, range(have, count))
            drawn = self._clock()
            self._keep(self.own, self._judge.read(images, range(have, count)))
            read = self._clock()
            more = count - have
            price = Price((drawn - begun) / more / self.own.calls, (read - drawn) / more)
            if read - self._begun > PROBE_SHARE * self._seconds:
                break
        return price

    def _keep(self, setting: Setting, more: Samples) -> None:
        have = self._drawn.get(setting)
        self._drawn[setting] = more if have is None else have + more

    def _select(self, plan: Plan, price: Price) -> list[SettingRow]:
        """Return rows of the settings that went farthest, by distance."""
        limit = self._begun + self._seconds - plan.decision_s(price)
        first = self._rows(self._round(plan.settings, plan.first, limit), plan.first)
        promoted = [row.setting for row in first if not row.out and row.setting != self.own]
        chosen = [self.own, *promoted[: plan.promoted]]
        second = self._round(chosen, plan.second, limit)
        return self._rows(second, plan.second) if len(second) > 1 else first

    def _round(self, settings: Sequence[Setting], count: int, limit: float) -> list[Setting]:
        """Draw samples of settings until each has `count`; return those that have, own first."""
        done, late = [], []
        for setting in settings:
            if setting != self.own and self._clock() > limit:
                late.append(setting)
                continue
            numbers = range(len(self._drawn.get(setting, ())), count)
            try:
                if len(numbers):
                    self._say(f"{count} samples: {setting}")
                    self._keep(setting, self._judge.read(self._draw(setting, numbers), numbers))
                done.append(setting)
            except NonFiniteError as error:
                if setting == self.own:
                    raise
                self._remarks.append(f"{setting}: left out, since {error.what}")
        if late:
            self._remarks.append(
                f"time ran out before {count} samples of: {'; '.join(map(str, late))}"
            )
        return done

    def _say(self, text: str) -> None:
        self._progress(min(1.0, (self._clock() - self._begun) / self._seconds), text)

    def _rows(self, settings: Sequence[Setting], count: int) -> list[SettingRow]:
        """Return rows of settings by their first samples, by distance."""
        own = self._drawn[self.own].first(count)
        rows = [
            self._judge.row(
                setting, self._drawn[setting].first(count), None if setting == self.own else own
            )
            for setting in settings
        ]
        return sorted(rows, key=lambda row: row.kid.value)

    def _all_rows(self) -> list[SettingRow]:
        """Return a row for each setting, by all of its samples, by distance."""
        rows = [self._rows([setting], len(samples)) for setting, samples in self._drawn.items()]
        return sorted((row for (row,) in rows), key=lambda row: row.kid.value)

    def _decide(
        self, plan: Plan, ahead: Sequence[SettingRow]
    ) -> tuple[list[SettingRow], DistanceEstimate | None]:
        """Compare the best setting with the run's own on new noise and conditions.

        With them goes the cheapest one that is not surely worse than the best, if there is a cheaper
        one.

        Returns:
            Rows of the own setting, the best, and perhaps the cheaper one; and the distance of the
            last less that of the best.
        """
        best = ahead[0]
        count = best.kid.n
        settings = [self.own, best.setting]
        cheaper = [
            row.setting
            for row in ahead[1:]
            if row.setting != self.own
            and row.setting.calls < best.setting.calls
            and self._difference(self._drawn, row.setting, best.setting, count).low <= 0
        ]
        if cheaper:
            settings.append(min(cheaper, key=lambda setting: setting.calls))
        drawn = self._draw_new(settings, plan.second)
        if not drawn:
            return [], None
        own = drawn[self.own]
        rows = [
            self._judge.row(setting, samples, None if setting == self.own else own)
            for setting, samples in drawn.items()
        ]
        worse = None
        if cheaper:
            worse = self._difference(drawn, settings[-1], best.setting, len(own))
        return rows, worse

    def _difference(
        self, drawn: dict[Setting, Samples], first: Setting, second: Setting, count: int
    ) -> DistanceEstimate:
        return self._judge.difference(drawn[first].first(count), drawn[second].first(count))

    def _draw_new(self, settings: Sequence[Setting], count: int) -> dict[Setting, Samples]:
        """Draw samples with new numbers, as many of each setting as the time allows, up to `count`."""
        drawn: dict[Setting, Samples] = {}
        slowest = 0.0
        for start in range(SECOND, SECOND + count, AT_ONCE):
            begun = self._clock()
            if begun + slowest > self._begun + self._seconds:
                break
            numbers = range(start, min(start + AT_ONCE, SECOND + count))
            self._say(f"decision: {len(numbers)} samples of {len(settings)} settings")
            new = {
                setting: self._judge.read(self._draw(setting, numbers), numbers)
                for setting in settings
            }
            drawn = {
                setting: drawn[setting] + samples if setting in drawn else samples
                for setting, samples in new.items()
            }
            slowest = max(slowest, self._clock() - begun)
        have = len(drawn[self.own]) if drawn else 0
        if have < count:
            self._remarks.append(
                f"time ran out: the decision has {have} samples of each setting instead of {count}"
            )
        return drawn

    def _sentence(self, final: Sequence[SettingRow], winner: SettingRow | None) -> str:
        if not final:
            return f"time ran out before a decision: the run's own setting ({self.own}) stays"
        if winner is None:
            best = final[1]
            note = f"; {best.out}" if best.out else ""
            return (
                f"no setting was surely better than the run's own ({self.own}), which stays; the "
                f"best of the others, {best.setting.instead_of(self.own)}: "
                f"{reason_for(final[0], best)}{note}"
            )
        return f"{winner.setting.instead_of(self.own)}: {reason_for(final[0], winner)}"


def _winner(final: Sequence[SettingRow], worse: DistanceEstimate | None) -> SettingRow | None:
    """Return the row of the setting to use; None where the run's own stays.

    The cheaper setting is taken only where the best one has passed, so that the chance of a false
    recommendation is that of one comparison.
    """
    if len(final) < 2 or final[1].out or not final[1].better:
        return None
    if worse is not None and worse.low <= 0 and final[2].better and not final[2].out:
        return final[2]
    return final[1]
