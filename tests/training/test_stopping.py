"""The verdict on when to stop, on errors whose truth is known."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from sfumato.training.denoising_error import Estimate, mean_interval
from sfumato.training.evidence import DRIFT_LIMIT, Comparison, Copies, Look, error_ratio, fisher
from sfumato.training.stopping import LEANS, best, change, next_mark, rules, verdict

IMAGES = 40


def look(step: int, error: float, ratio: float = 1.0, *, images: int = IMAGES, copies=None) -> Look:
    """A look at images that differ by 30 %, with fresh noise of 1 % at each step."""
    each = np.random.default_rng(0).lognormal(0, 0.3, (2, images))
    noise = np.random.default_rng(step).lognormal(0, 0.01, (2, images))
    held_out, seen = error * each * noise
    return Look(
        step=step,
        views=float(step),
        held_out=tuple(held_out),
        seen=tuple(seen * held_out.mean() / seen.mean() / ratio),
        copies=copies,
    )


def curve(errors: list[float], ratios: list[float] | None = None, **options) -> list[Look]:
    ratios = ratios or [1.0] * len(errors)
    steps = [round(8 * 1.2**number) for number in range(len(errors))]
    return [
        look(step, error, ratio, **options)
        for step, error, ratio in zip(steps, errors, ratios, strict=True)
    ]


FALLING = [1.0 * 0.9**number for number in range(12)]


@pytest.mark.parametrize(
    ("looks", "state"),
    [
        (curve(FALLING[:2]), "too early"),
        (curve(FALLING), "learning"),
        (curve(FALLING, [1.0] * 6 + [1.6] * 6), "leans"),
        (curve([*FALLING[:6], *[0.59] * 8]), "converged"),
        (curve([*FALLING[:6], 0.59, 0.6, 0.63, 0.68, 0.74], [1.3] * 11), "overfitting"),
        (curve([*FALLING[:6], 0.59, 0.6, 0.63, 0.68, 0.74], [1.0] * 11), "converged"),
        (curve([*FALLING[:6], *[0.59] * 6], [1.0] * 6 + [2.0] * 6), "overfitting"),
        (curve(FALLING, images=8), "cannot tell"),
    ],
)
def test_each_state_is_found(looks: list[Look], state: str) -> None:
    found = verdict(looks)
    assert found.state == state
    assert found.stop == (state in ("overfitting", "converged"))
    assert found.sentence.startswith("stop:") == found.stop


def test_a_rule_must_hold_twice_in_a_row() -> None:
    once = curve([*FALLING[:6], 0.70], [1.2] * 7)
    assert rules(once).overfits
    assert verdict(once).state != "overfitting"
    assert verdict([*once, look(40, 0.75, 1.2)]).state == "overfitting"


def test_a_rise_beside_a_ratio_that_leans_needs_one_look() -> None:
    assert verdict(curve([*FALLING[:6], 0.70], [1.5] * 7)).state == "overfitting"
    assert verdict(curve([*FALLING[:6], 0.58], [1.5] * 7)).state == "leans"


def test_copies_overrule_everything_else_and_one_in_a_hundred_does_not() -> None:
    few = Copies(count=1, samples=200, real_count=0, real=60)
    many = Copies(count=23, samples=200, real_count=0, real=60)
    assert verdict([*curve(FALLING), look(100, 0.2, copies=few)]).state == "learning"
    found = verdict([*curve(FALLING), look(100, 0.2, copies=many), look(110, 0.19)])
    assert found.state == "copying"
    assert "23 of 200 samples" in found.sentence


def test_copies_as_frequent_among_real_images_are_no_copying() -> None:
    """Of unseen emoji, 1.8 % are near-duplicates of others."""
    assert Copies(count=8, samples=200, real_count=0, real=200).found
    assert not Copies(count=8, samples=200, real_count=4, real=200).found


def test_the_best_look_is_the_earliest_that_no_later_one_beats() -> None:
    looks = curve([1.0, 0.8, 0.7, 0.699, 0.7, 0.72, 0.8])
    assert best(looks) is looks[2]
    assert verdict(looks).best_step == looks[2].step


def pair(fall: float, errors: float) -> list[Look]:
    """Two looks: the error falls by so much on average, which is so many standard errors."""
    each = np.random.default_rng(0).lognormal(0, 0.3, IMAGES)
    spread = np.tile([1.0, -1.0], IMAGES // 2)
    spread *= fall * each.mean() / errors * math.sqrt(IMAGES) / spread.std(ddof=1)
    common = {"seen": (1.0, 1.0)}
    return [
        Look(step=10, views=10, held_out=tuple(each), **common),
        Look(step=20, views=20, held_out=tuple(each - fall * each.mean() + spread), **common),
    ]


@pytest.mark.parametrize(("errors", "step"), [(0.7, 10), (0.95, 10), (1.1, 20), (3.0, 20)])
def test_a_later_look_is_best_if_it_is_better_by_a_standard_error(errors: float, step: int) -> None:
    looks = pair(0.03, errors)
    assert change(*looks).mean == pytest.approx(-0.03)
    assert best(looks).step == step


@pytest.mark.parametrize(
    ("fall", "errors", "converged"),
    [(0.03, 1.0, False), (0.005, 1.0, True), (0.005, 4.0, False), (-0.02, 1.0, True)],
)
def test_what_falls_on_average_has_not_converged(
    fall: float, errors: float, converged: bool
) -> None:
    assert rules(pair(fall, errors)).converged == converged


def test_of_few_held_out_images_the_least_error_is_best_and_without_any_the_last_look() -> None:
    errors = [1.0, 0.8, 0.7, 0.699, 0.72, 0.8]
    for images in (1, 2, 11):
        looks = curve(errors, images=images)
        assert best(looks) is min(looks, key=lambda one: one.error)
    looks = [replace(look, held_out=(), seen=()) for look in curve(errors)]
    assert best(looks) is looks[-1]
    assert verdict(looks).state == "cannot tell"
    copied = replace(looks[-1], copies=Copies(count=23, samples=200, real_count=0, real=60))
    assert verdict([*looks, copied]).state == "copying"


def tuned(
    step: int,
    gain: float | None,
    *,
    half: float = 0.05,
    drift: float | None = 0.01,
    images: int = 3,
) -> Look:
    """A look at a fine-tuning whose base has an error of 1 on every image."""
    ones = (1.0,) * images
    return Look(
        step=step,
        views=float(step),
        held_out=() if gain is None else tuple(1 - gain for _ in ones),
        seen=() if gain is None else ones,
        base=Comparison(
            held_out=() if gain is None else ones,
            seen=() if gain is None else ones,
            gain=None if gain is None else Estimate(gain, gain - half, gain + half),
            drift=drift,
        ),
    )


@pytest.mark.parametrize(
    ("looks", "step"),
    [
        ([tuned(1, 0.1), tuned(2, 0.2), tuned(3, 0.3)], 3),
        ([tuned(1, 0.30), tuned(2, 0.27), tuned(3, 0.24)], 2),
        ([tuned(1, 0.1), tuned(2, 0.9, drift=1.01 * DRIFT_LIMIT)], 1),
        ([tuned(1, 0.5, drift=0.3), tuned(2, 0.6, drift=0.2), tuned(3, 0.6, drift=0.4)], 2),
        ([tuned(1, 0.1, drift=None)], 1),
        ([tuned(1, None), tuned(2, None), tuned(3, None, drift=0.2)], 2),
        ([tuned(1, 0.1, half=math.inf), tuned(2, -0.1, half=math.inf)], 2),
    ],
)
def test_the_best_of_a_fine_tuning_is_the_latest_within_the_interval_of_the_largest_gain(
    looks: list[Look], step: int
) -> None:
    assert best(looks).step == step
    found = verdict(looks)
    assert found.best_step == step
    assert found.plain()["use_best"]
    assert (found.state == "forgetting") == looks[-1].forgets
    json.dumps(found.plain(), allow_nan=False)


def test_forgetting_says_stop_and_names_a_step_that_did_not() -> None:
    looks = [tuned(1, 0.1), tuned(2, 0.9, drift=1.01 * DRIFT_LIMIT)]
    found = verdict(looks)
    assert found.stop
    assert "the model forgets what its base knew (change 10% of the base's error" in found.sentence
    assert found.sentence.endswith("use step 1")
    assert "at every look" in verdict(looks[1:]).sentence


def test_the_ratio_of_a_fine_tuning_is_relative_to_its_base() -> None:
    harder = look(10, 1.0, ratio=1.6)
    assert harder.ratio.low > LEANS  # but the base knew neither set, and finds the same
    base = Comparison(held_out=harder.held_out, seen=harder.seen)
    beside = replace(harder, base=base)
    np.testing.assert_allclose(beside.ratio, [1, 1, 1])
    learned = replace(beside, seen=tuple(0.5 * error for error in harder.seen))
    np.testing.assert_allclose(learned.ratio, [2, 2, 2], rtol=1e-6)


def test_the_ratio_has_welchs_interval() -> None:
    generator = np.random.default_rng(1)
    first, second = generator.lognormal(0.2, 0.4, 17), generator.lognormal(0, 0.2, 31)
    found = error_ratio(torch.tensor(first), torch.tensor(second), level=0.95)
    test = stats.ttest_ind(np.log(first), np.log(second), equal_var=False)
    interval = test.confidence_interval(0.95)
    np.testing.assert_allclose(
        [math.log(value) for value in found],
        [np.log(first).mean() - np.log(second).mean(), interval.low, interval.high],
        rtol=1e-9,
    )


def test_the_change_is_paired_by_image() -> None:
    before, after = look(1, 1.0), look(2, 0.9)
    test = stats.ttest_rel(after.held_out, before.held_out).confidence_interval(0.98)
    scale = np.mean(before.held_out)
    found = change(before, after)
    np.testing.assert_allclose(found[1:], [test.low / scale, test.high / scale], rtol=1e-9)
    assert found.high - found.low < 0.03  # images differ by 30 %, which pairing removes


def test_intervals_of_one_image_are_infinite_and_of_equal_ones_are_points() -> None:
    assert mean_interval(torch.tensor([1.0])).high == math.inf
    assert mean_interval(torch.tensor([2.0, 2.0]))[1:] == (2.0, 2.0)
    assert error_ratio(torch.tensor([1.0]), torch.tensor([1.0, 2.0]), level=0.95).low == 0
    assert error_ratio(torch.ones(3), torch.ones(3), level=0.95) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("held_out", [12, 25, 50])
def test_false_alarms_are_rare_and_intervals_cover(held_out: int) -> None:
    """Neither set was trained on: 1,000 pairs of sets of images whose errors differ by 30 %."""
    generator = np.random.default_rng(held_out)
    alarms, rises, covered = 0, 0, 0
    draws = 1000
    for _ in range(draws):
        first, second = generator.lognormal(0, 0.3, held_out), generator.lognormal(0, 0.3, 50)
        sure = error_ratio(torch.tensor(first), torch.tensor(second), level=0.98)
        usual = error_ratio(torch.tensor(first), torch.tensor(second), level=0.95)
        alarms += sure.low > LEANS
        covered += usual.low < 1 < usual.high
        later = first * generator.lognormal(0, 0.05, held_out)
        looks = [
            Look(step=step, views=step, held_out=tuple(values), seen=tuple(second))
            for step, values in ((1, first), (2, later))
        ]
        rises += rules(looks).rise.low > 0
    assert alarms == 0
    assert rises <= 0.02 * draws  # one-sided 99 % at a single look, and two are needed
    assert 0.93 * draws <= covered <= 0.97 * draws


@pytest.mark.parametrize("table", [(3, 30, 1, 20), (0, 5, 0, 5), (16, 200, 0, 60), (5, 5, 1, 9)])
def test_fishers_test_is_scipys(table: tuple[int, int, int, int]) -> None:
    count, total, other, others = table
    expected = stats.fisher_exact(
        [[count, total - count], [other, others - other]], alternative="greater"
    )
    np.testing.assert_allclose(fisher(*table), expected.pvalue, rtol=1e-9)


def test_marks_are_spaced_by_views() -> None:
    marks, views = [], 0.0
    while views < 100:
        views = next_mark(views)
        marks.append(round(views, 2))
    assert marks[:6] == [1, 2, 4, 8, 9.6, 11.52]
    assert 15 < len(marks) < 20  # a dozen looks and more before 100 views
    assert next_mark(0.3) == 1
    assert next_mark(3.0) == 4


@pytest.mark.parametrize(
    "one", [tuned(1, 0.1, half=math.inf), tuned(2, None, drift=None), tuned(3, 0.2)]
)
def test_a_look_at_a_fine_tuning_is_read_as_it_was_written(one: Look) -> None:
    assert Look.read(json.loads(json.dumps(one.plain(), allow_nan=False))) == one


def test_a_look_is_read_as_it_was_written() -> None:
    whole = look(7, 0.1 + 0.2, 1.3, copies=Copies(count=1, samples=2, real_count=0, real=3))
    assert Look.read(json.loads(json.dumps(whole.plain()))) == whole
    assert json.loads(json.dumps(verdict([whole]).plain()))["state"] == "too early"
