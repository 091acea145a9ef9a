"""Checkpoints, previews and validation by the clock, and that what is looked at never changes what
is learned.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from sfumato import config
from sfumato.errors import ConfigError
from sfumato.observability.progress import Clock
from sfumato.recipes import Run
from sfumato.runs import resume, train
from sfumato.training import (
    Budget,
    CheckpointConfig,
    PreviewConfig,
    TrainingConfig,
    ValidationConfig,
)
from sfumato.training.config import FIRST_EVALUATION_S, INTERVAL_PER_COST
from tests.helpers.runs import fingerprint, images, tiny_run

KINDS = [CheckpointConfig, PreviewConfig, ValidationConfig]
BY_CLOCK = {
    "checkpoint": CheckpointConfig(keep=20, every_minutes=2.0),
    "preview": PreviewConfig(num=2, every_minutes=2.0),
    "validation": ValidationConfig(samples=4, every_minutes=2.0, copy_samples=0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def steps_of_30_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step of training takes 30 s by the run's own clock, whatever it takes by that of the
    machine.
    """
    made = Clock.__init__

    def begin(self: Clock, seconds_before: float, steps_before: int) -> None:
        made(self, seconds_before, steps_before)
        self.passed = seconds_before  # type: ignore[attr-defined]

    def seconds(self: Clock) -> float:
        self.passed += 30.0  # type: ignore[attr-defined]
        return self.passed  # type: ignore[attr-defined]

    monkeypatch.setattr(
        "sfumato.training.timetable.time", SimpleNamespace(perf_counter=lambda: 0.0)
    )  # looking takes no time
    monkeypatch.setattr(Clock, "__init__", begin)
    monkeypatch.setattr(Clock, "seconds", seconds)


def shown(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "samples").glob("step-*"))


def saved(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def validated(run: Path) -> list[int]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "validation/ema/eps_mse" in line]


@pytest.mark.parametrize("kind", KINDS)
def test_by_default_everything_goes_by_the_clock(kind: type) -> None:
    cadence = kind()
    assert cadence.every_steps is None
    assert not cadence.due(step=500, seconds=301.0, last_s=2.0)
    assert cadence.due(step=7, seconds=302.0, last_s=2.0)


@pytest.mark.parametrize("kind", KINDS)
def test_whichever_is_sooner(kind: type) -> None:
    both = kind(every_steps=10, every_minutes=1.0)
    assert both.due(step=20, seconds=3.0, last_s=2.0)
    assert both.due(step=21, seconds=62.0, last_s=2.0)
    assert not both.due(step=21, seconds=61.0, last_s=2.0)
    steps = kind(every_steps=10, every_minutes=None)
    assert not steps.due(step=21, seconds=1e9, last_s=2.0)
    assert steps.wait_s(first=True, cost_s=1.0) == math.inf


@pytest.mark.parametrize("kind", [PreviewConfig, ValidationConfig])
def test_the_first_look_comes_within_a_minute_and_earlier_where_that_is_set(kind: type) -> None:
    assert FIRST_EVALUATION_S < 60
    assert not kind().due(step=3, seconds=FIRST_EVALUATION_S - 1, last_s=0.0)
    assert kind().due(step=3, seconds=FIRST_EVALUATION_S, last_s=0.0)
    assert kind(every_minutes=0.1).due(step=3, seconds=6.0, last_s=0.0)


@pytest.mark.parametrize("kind", [PreviewConfig, ValidationConfig])
def test_a_slow_look_before_the_first_step_does_not_put_off_the_next(kind: type) -> None:
    assert not kind().due(step=1, seconds=30.0 + FIRST_EVALUATION_S - 1, last_s=0.0, cost_s=30.0)
    assert kind().due(step=9, seconds=30.0 + FIRST_EVALUATION_S, last_s=0.0, cost_s=30.0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_takes_long_waits_longer(kind: type) -> None:
    assert not kind().due(step=1, seconds=302.0, last_s=2.0, cost_s=60.0)
    assert kind().due(step=1, seconds=2.0 + 60 * INTERVAL_PER_COST, last_s=2.0, cost_s=60.0)


@pytest.mark.parametrize("name", ["checkpoint", "preview", "validation"])
@pytest.mark.parametrize("minutes", [0.0, -1.0, math.inf, math.nan])
def test_minutes_that_are_not_a_time_are_refused(name: str, minutes: float) -> None:
    kinds = dict(zip(["checkpoint", "preview", "validation"], KINDS, strict=True))
    with pytest.raises(ConfigError, match=rf"{name}\.every_minutes"):
        TrainingConfig(**{name: kinds[name](every_minutes=minutes)})


def test_a_slow_run_goes_by_the_clock_and_resumed_it_ends_as_if_left_alone(
    folder: Path, tmp_path: Path, steps_of_30_s: None
) -> None:
    settings = tiny_run(folder, budget=Budget(steps=11), **BY_CLOCK)
    whole = train(settings, run=tmp_path / "whole")
    assert saved(whole) == [0, 4, 8, 11]
    assert shown(whole) == [0, 2, 6, 10, 11]  # 60 s, then every 2 minutes
    assert validated(whole) == [2, 6, 10, 11]
    cut = train(settings, run=tmp_path / "cut")
    for path in (cut / "checkpoints").glob("step-*"):
        if path.name > "step-000000004":
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    (cut / "status.json").unlink()
    resume(cut)
    assert fingerprint(cut) == fingerprint(whole)
    assert (saved(cut), shown(cut)) == (saved(whole), shown(whole))


def test_looking_by_the_clock_changes_nothing_that_is_learned(
    folder: Path, tmp_path: Path, steps_of_30_s: None
) -> None:
    by_clock = tiny_run(folder, budget=Budget(steps=6), **BY_CLOCK)
    often = replace(
        by_clock,
        preview=PreviewConfig(num=1, every_minutes=0.1),
        validation=ValidationConfig(samples=4, every_minutes=0.1, copy_samples=0),
        checkpoint=CheckpointConfig(every_minutes=0.1),
    )
    found = [
        fingerprint(train(run, run=tmp_path / name))
        for name, run in (("a", by_clock), ("b", often))
    ]
    for part in ("model", "ema", "optimizer", "losses", "step"):
        assert found[0][part] == found[1][part]


def test_a_run_directory_of_before_the_clock_is_read_as_it_was_written() -> None:
    plain = config.plain(Run(name="old"))
    for name in ("checkpoint", "preview", "validation"):
        del plain[name]["every_minutes"]
        plain[name]["every_steps"] = 500
    run = config.parse(Run, plain)
    assert (run.checkpoint.every_steps, run.checkpoint.every_minutes) == (500, 5.0)
