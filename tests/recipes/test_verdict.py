"""The verdict of a dry run: what speaks against a plan, and what to change; nothing where nothing
does.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from sfumato.runs.cost import CostEstimate
from sfumato.runs.plan_check import (
    AUTOENCODER_STEPS,
    ENOUGH,
    MANY_VIEWS,
    TOO_FEW,
    Machine,
    findings,
)

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
    ("epochs", "images", "warned"),
    [(MANY_VIEWS + 1.0, 4999, True), (MANY_VIEWS - 1.0, 100, False), (900.0, 5000, False)],
)
def test_many_views_of_few_images_are_warned_of(epochs: float, images: int, warned: bool) -> None:
    assert (
        any("memorized" in line for line in said(replace(GOOD, epochs=epochs), images=images))
        == warned
    )


def test_what_does_not_fit_the_machine_comes_first() -> None:
    lines = said(
        replace(GOOD, epochs=999.0), images=10, machine=Machine(memory_gib=1.0, disk_gib=0.1)
    )
    assert "1.2 GiB of memory are needed, and this machine has 1.0 GiB" in lines[0]
    assert "0.12 GiB of disk are needed, and 0.10 GiB are free" in lines[1]
    assert "views of each image" in lines[2]


def test_every_finding_says_what_to_change() -> None:
    stages = [replace(OWN, steps=5), replace(GOOD, images=640, steps=10, epochs=999.0)]
    for finding in findings(stages, images=9, machine=Machine(memory_gib=0.1, disk_gib=0.0)):
        assert finding.change.split()[0] in ("set", "free")
