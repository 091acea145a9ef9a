"""The verdict of a dry run: what speaks against a plan, and what to change; nothing where nothing
does.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sfumato.runs.cost import CostEstimate
from sfumato.runs.plan_check import (
    AUTOENCODER_STEPS,
    ENOUGH,
    TOO_FEW,
    Machine,
    findings,
    views_before_planning,
    views_line,
)
from sfumato.training import Budget
from sfumato.training.enough import BEST_VIEWS, PROTECTED_VIEWS
from tests.helpers.runs import tiny_run

ROOMY = Machine(memory_gib=16.0, disk_gib=100.0)
GOOD = CostEstimate(
    stage="diffusion model",
    step_s=0.5,
    steps=7200,
    seconds=3600.0,
    epochs=46.0,
    memory_gib=1.25,
    disk_gib=0.125,
    images=460_800,
)
OWN = replace(
    GOOD,
    stage="autoencoder",
    steps=AUTOENCODER_STEPS,
    seconds=1200.0,
    images=16 * AUTOENCODER_STEPS,
)


def said(*stages: CostEstimate, images: int = 10_000, machine: Machine = ROOMY) -> list[str]:
    return [finding.line() for finding in findings(stages, images=images, machine=machine)]


def test_a_long_enough_plan_that_fits_has_nothing_against_it() -> None:
    assert said(GOOD) == said(OWN, GOOD) == []


@pytest.mark.parametrize("images", [ENOUGH - 64, TOO_FEW, TOO_FEW - 64, 64])
def test_a_short_plan_says_how_many_minutes_are_enough(images: int) -> None:
    steps = images // 64
    (line,) = said(replace(GOOD, images=64 * steps, steps=steps, seconds=3.0 * steps))
    assert ("too short" in line) == (64 * steps < TOO_FEW)
    assert "set budget.minutes=36 (704 steps, 35:12 on this machine)" in line


def test_an_autoencoder_of_107_steps_is_too_short() -> None:
    (line,) = said(replace(OWN, steps=107, seconds=1200.0), GOOD)
    assert "107 steps are too few for an autoencoder" in line
    assert "set autoencoder.budget.minutes=374" in line


@pytest.mark.parametrize(
    ("epochs", "images", "protected", "warned"),
    [
        (BEST_VIEWS[1] + 1.0, 4999, False, True),
        (BEST_VIEWS[1] + 1.0, 4999, True, False),
        (BEST_VIEWS[1] - 1.0, 100, False, False),
        (PROTECTED_VIEWS + 1.0, 100, True, True),
        (900.0, 5000, False, False),
    ],
)
def test_many_views_of_few_images_are_warned_of_in_one_sentence(
    epochs: float, images: int, protected: bool, warned: bool
) -> None:
    plan = replace(GOOD, epochs=epochs)
    found = findings([plan], images=images, machine=ROOMY, protected=protected)
    line = views_line(plan, images=images, from_scratch=True, protected=protected)
    lines = [finding.line() for finding in found] + ([line] if line else [])
    assert len(lines) == 1
    assert f"{images:,} images, each seen about {epochs:.0f} times by this budget" in lines[0]
    assert ("stop=overfitting" in lines[0]) == warned == (line == "")
    assert views_line(plan, images=images, from_scratch=False, protected=protected) == ""


def test_a_small_set_is_not_told_to_train_until_it_is_memorized() -> None:
    """At 165 views 49 images are 8,085 samples: no longer training is proposed."""
    short = replace(GOOD, images=6400, steps=100, seconds=300.0, epochs=6400 / 49)
    (finding,) = findings([short], images=49, machine=ROOMY)
    assert "49 images can be seen 165 times, 8,085 samples, before" in finding.what
    assert "budget.minutes=7 (127 steps" in finding.change
    long = replace(short, images=8128, steps=127, epochs=8128 / 49)
    (finding,) = findings([long], images=49, machine=ROOMY)
    assert "budget.epochs=165" in finding.change


@pytest.mark.parametrize(
    ("changes", "images", "said"),
    [
        # 25 of 100 held out; 14 steps of 12 images
        ({"budget": Budget(steps=14)}, 100, "75 images, each seen about 1.5 times by this budget"),
        ({"budget": Budget(epochs=30)}, 100, "75 images, each seen about 30 times by this budget"),
        ({"budget": Budget(minutes=9)}, 100, "seen about 600 times by 45,000 training samples"),
    ],
)
def test_before_the_steps_are_timed_views_follow_from_the_budget(
    changes: dict[str, Budget], images: int, said: str
) -> None:
    run = tiny_run(Path("images"), **changes)
    network = run.network.build(image_channels=1)
    assert said in views_before_planning(run, images, network=network)
    half = replace(run, data=replace(run.data, half="first", holdout=0.0))
    assert "50 images" in views_before_planning(half, images, network=network)
    assert views_before_planning(run, 0, network=network) == ""


def test_what_does_not_fit_the_machine_comes_first() -> None:
    lines = said(
        replace(GOOD, epochs=999.0), images=10, machine=Machine(memory_gib=1.0, disk_gib=0.1)
    )
    assert "1.2 GiB of memory are needed, and this machine has 1.0 GiB" in lines[0]
    assert "0.12 GiB of disk are needed, and 0.10 GiB are free" in lines[1]
    assert "10 images, each seen about 999 times" in lines[2]


def test_every_finding_says_what_to_change() -> None:
    stages = [replace(OWN, steps=5), replace(GOOD, images=640, steps=10, epochs=999.0)]
    for finding in findings(stages, images=9, machine=Machine(memory_gib=0.1, disk_gib=0.0)):
        assert finding.change.split()[0] in ("set", "free")
