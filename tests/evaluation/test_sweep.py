"""The sweep decides by noise: what is not surely better is not recommended, what is planted is
found, copies are excluded, and the time is kept.
"""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from sfumato.errors import CheckpointError, NonFiniteError, RunError
from sfumato.evaluation.distances import (
    KernelReference,
    compare_kernels,
    kernel_distance,
    paired_difference,
)
from sfumato.evaluation.sweep import Sweep
from sfumato.evaluation.sweep_judge import COPIES, MISREADS, Judge, Samples
from sfumato.evaluation.sweep_plan import NUMBERS, Plan, Price, plans, settings_around
from sfumato.evaluation.sweep_result import Setting, SweepAdvice, SweepResult
from sfumato.training.evidence import Copies

OWN = Setting(weights="ema", guidance=2.0, steps=20)
DIMENSIONS, HELD_OUT = 8, 40


def grid(*, widths: tuple[float, ...] = ()) -> list[Setting]:
    return settings_around(OWN, guidable=True, widths=widths)


class Counter:
    """Finds no copies, except where a sample is marked as one."""

    index = SimpleNamespace(rule="copy", positions=np.arange(100))

    def beside_real(self, found: np.ndarray) -> Copies:
        return Copies(count=int(found.sum()), samples=len(found), real_count=0, real=200)


class Stub(Judge):
    """Images are features already; the first value of a copy is above 50, that of a misread image
    below -50.
    """

    def read(self, images: Tensor, numbers: range) -> Samples:
        first = images[:, 0]
        return Samples(
            features=images.where(images.abs() < 50, 0.0),
            copied=(first > 50).numpy(),
            as_requested=(first > -50).float(),
        )


class World:
    """Draws features around those of real images, and takes time for it."""

    def __init__(
        self,
        *,
        seed: int = 0,
        shifts: dict[Setting, float] | None = None,
        marks: dict[Setting, float] | None = None,
        call_s: float = 1e-3,
    ) -> None:
        self.shifts, self.marks, self.call_s = shifts or {}, marks or {}, call_s
        self.seed, self.time, self.drawn = seed, 0.0, dict[Setting, list[range]]()
        generator = torch.Generator().manual_seed(seed)
        self.noise = torch.randn(NUMBERS, DIMENSIONS, generator=generator)
        self.judge = Stub(
            network=SimpleNamespace(name="stub"),
            held_out=torch.randn(HELD_OUT, DIMENSIONS, generator=generator),
            copies=Counter(),
        )

    def draw(self, setting: Setting, numbers: range) -> Tensor:
        """Common noise, a little of each setting's own, and its shift."""
        self.drawn.setdefault(setting, []).append(numbers)
        self.time += len(numbers) * setting.calls * self.call_s
        own = torch.Generator().manual_seed(hash(astuple_of(setting)) % 2**31 + self.seed)
        images = self.noise + 0.3 * torch.randn(NUMBERS, DIMENSIONS, generator=own)
        images += 0.6 + self.shifts.get(setting, 0.0)
        if setting in self.marks:
            images[::3, 0] = self.marks[setting]
        return images[numbers.start : numbers.stop]

    def sweep(self, *, seconds: float = 1e9, settings: list[Setting] | None = None) -> SweepResult:
        return Sweep(
            settings or grid(),
            self.draw,
            self.judge,
            seconds=seconds,
            step=7,
            clock=lambda: self.time,
        ).run()


def astuple_of(setting: Setting) -> tuple[float, int]:
    return setting.guidance, setting.steps


BETTER = replace(OWN, guidance=1.0)


def test_the_paired_difference_is_that_of_a_bootstrap_by_hand() -> None:
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(30, 4, generator=generator).double()
    second = (first + 0.5 * torch.randn(30, 4, generator=generator)).double()
    real = torch.randn(20, 4, generator=generator).double()
    reference = KernelReference(real, resamples=50)
    compared = [compare_kernels(each, [reference]) for each in (first, second)]
    found = paired_difference(*compared)
    assert found.value == pytest.approx(
        kernel_distance(first, real) - kernel_distance(second, real), rel=1e-9
    )

    def distance(samples: Tensor, drawn: Tensor, real_drawn: Tensor) -> float:
        """The mean over pairs of different images, each as often as it was drawn."""

        def inner(values: Tensor, numbers: Tensor) -> float:
            kernel = (values @ values.T / 4 + 1) ** 3
            pairs = [(i, j) for i in numbers.tolist() for j in numbers.tolist() if i != j]
            return float(torch.stack([kernel[i, j] for i, j in pairs]).mean())

        across = ((samples[drawn] @ real[real_drawn].T / 4 + 1) ** 3).mean()
        return inner(samples, drawn) + inner(real, real_drawn) - 2 * float(across)

    counts = reference.counts[0]
    real_drawn = torch.repeat_interleave(torch.arange(20), counts.long())
    own = torch.randint(30, (50, 30), generator=torch.Generator().manual_seed(0))[0]
    by_hand = distance(first, own, real_drawn) - distance(second, own, real_drawn)
    assert float(compared[0].draws[0, 0] - compared[1].draws[0, 0]) == pytest.approx(by_hand)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfumato.evaluation.sweep_judge.RESAMPLES", 200)


def test_without_a_real_difference_another_setting_is_rarely_recommended() -> None:
    settings = [OWN, *(replace(OWN, guidance=scale) for scale in (1.5, 2.5, 3.0))]
    results = [World(seed=seed).sweep(settings=settings) for seed in range(100)]
    assert sum(bool(result.final) for result in results) > 50  # the selection is misled
    assert sum(result.recommended is not None for result in results) <= 5


def test_a_planted_difference_is_found_whatever_the_order() -> None:
    result = World(shifts={BETTER: -0.5}).sweep()
    assert result.recommended == BETTER
    assert result.sentence.startswith("guidance 1 instead of 2: kernel distance (KID) to 40 held")
    assert result.final[1].difference.high < 0
    assert result.rows[0].setting == BETTER
    worse = World(shifts={OWN: -0.6}).sweep()
    assert worse.recommended is None
    assert "which stays" in worse.sentence


def test_of_settings_that_are_alike_the_cheapest_is_recommended() -> None:
    cheap = replace(BETTER, steps=10)
    result = World(shifts={BETTER: -0.5, cheap: -0.5}).sweep()
    assert result.recommended == cheap
    dear = World(shifts={BETTER: -0.55, cheap: -0.3}).sweep()
    assert dear.recommended == BETTER


@pytest.mark.parametrize(("mark", "reason"), [(99.0, COPIES), (-99.0, MISREADS)])
def test_a_setting_that_copies_or_misreads_is_out_however_near_it_is(
    mark: float, reason: str
) -> None:
    result = World(shifts={BETTER: -0.5}, marks={BETTER: mark}).sweep()
    assert result.recommended is None
    assert {row.setting for row in result.rows if row.out} == {BETTER}
    assert next(row.out for row in result.rows if row.setting == BETTER) == reason


def test_where_the_own_setting_copies_nothing_is_recommended() -> None:
    result = World(shifts={BETTER: -0.5}, marks={OWN: 99.0}).sweep()
    assert (result.recommended, list(result.final)) == (None, [])
    assert "copies training images" in result.sentence


def test_a_setting_whose_samples_are_not_finite_is_left_out_and_named() -> None:
    world = World(shifts={BETTER: -0.5})
    draw = world.draw

    def broken(setting: Setting, numbers: range) -> Tensor:
        if setting == BETTER:
            raise NonFiniteError("the model's output is not finite", where="sample", hint="-")
        return draw(setting, numbers)

    world.draw = broken  # type: ignore[method-assign]
    result = world.sweep()
    assert BETTER not in [row.setting for row in result.rows]
    assert any(str(BETTER) in remark for remark in result.remarks)


def test_the_decision_has_numbers_that_the_selection_has_not() -> None:
    world = World(shifts={BETTER: -0.5})
    result = world.sweep()
    selected = [number for numbers in world.drawn[OWN][:-4] for number in numbers]
    decided = [number for numbers in world.drawn[OWN][-4:] for number in numbers]
    assert selected == list(range(256))
    assert decided == list(range(256, 512))
    assert [row.kid.n for row in result.final] == [256] * len(result.final)


@pytest.mark.parametrize("seconds", [22.0, 30.0, 60.0, 90.0, 200.0])
def test_the_time_is_kept_and_what_was_cut_is_said(seconds: float) -> None:
    world = World(shifts={BETTER: -0.5})
    result = world.sweep(seconds=seconds)
    assert world.time <= seconds
    assert result.seconds == world.time
    whole = plans(grid())[0].seconds(Price(1e-3, 0.0))
    assert bool(result.remarks) == (seconds < whole)
    assert result.recommended in (BETTER, replace(BETTER, steps=10))


def test_too_little_time_is_refused_with_what_would_do() -> None:
    world = World()
    with pytest.raises(RunError, match="minutes are too few") as caught:
        world.sweep(seconds=6.0)
    needed = 60 * float(caught.value.hint.split()[4])
    assert World(shifts={BETTER: -0.5}).sweep(seconds=needed).rows
    assert world.time < 6


def test_a_slow_machine_ends_the_sweep_in_time_and_says_so() -> None:
    world = World(shifts={BETTER: -0.5})
    draw = world.draw

    def slower(setting: Setting, numbers: range) -> Tensor:
        world.call_s = 1e-3 if world.time < 10 else 3e-3
        return draw(setting, numbers)

    world.draw = slower  # type: ignore[method-assign]
    result = world.sweep(seconds=80)
    assert any("time ran out" in remark for remark in result.remarks)
    assert world.time < 100


def test_the_grid_has_the_own_setting_first_and_no_guidance_where_there_is_none() -> None:
    settings = grid(widths=(0.05, 0.2))
    assert settings[0] == OWN
    assert len(settings) == len(set(settings)) == 4 * 2 * 3
    assert {setting.guidance for setting in settings} == {1.0, 1.5, 2.0, 3.0}
    unguided = settings_around(OWN, guidable=False, widths=())
    assert unguided == [OWN, replace(OWN, steps=10)]
    single = Setting(weights="best", guidance=1.0, steps=1)
    assert settings_around(single, guidable=False, widths=()) == [single]
    assert all(plan.settings[0] == OWN for plan in plans(settings))
    assert isinstance(plans(settings)[-1], Plan)


def test_the_advice_is_read_from_what_was_written(tmp_path) -> None:
    result = World(shifts={BETTER: -0.5}).sweep()
    path = tmp_path / "sweep.json"
    assert SweepAdvice.read(path) is None
    path.write_text(json.dumps(result.plain()))
    advice = SweepAdvice.read(path)
    assert advice == SweepAdvice(
        step=7, own=OWN, recommended=result.recommended, reason=result.reason
    )
    figure = result.plain()["rows"][0]["kid"]
    assert set(figure) >= {"value", "low", "high", "n", "metric", "extractor", "reference"}
    path.write_text(json.dumps({**result.plain(), "recommended": None}))
    assert SweepAdvice.read(path) is None
    for damaged in ("{", "[]", "{}", json.dumps({**result.plain(), "own": {"cfg": 2}})):
        path.write_text(damaged)
        with pytest.raises(CheckpointError, match="cannot be read"):
            SweepAdvice.read(path)
