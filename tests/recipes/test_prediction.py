"""What a run is said to take is what it takes: steps exactly, disk at least, and larger runs
more.
"""

import io
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato import runs
from sfumato.autoencoders import KLConfig
from sfumato.conditioners import CategoryConfig
from sfumato.contexts import ContextConfig
from sfumato.data import AugmentConfig, DataConfig, Folder
from sfumato.networks import UNetConfig
from sfumato.recipes import Run
from sfumato.recipes.autoencoder_stage import TrainedAutoencoder
from sfumato.runs import prepare
from sfumato.runs.cost import CostEstimate, count_due, estimate_cost, trial_trainer
from sfumato.runs.preparation import network_parameters
from sfumato.training import (
    Budget,
    CheckpointConfig,
    LogConfig,
    OptimizerConfig,
    PreviewConfig,
    ValidationConfig,
)
from sfumato.training.config import Cadence

COUNT = 30


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(COUNT):
        buffer = io.BytesIO()
        Image.fromarray(
            np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
        ).save(buffer, "PNG")
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(buffer.getvalue())
    return folder


def tiny(root: Path, *, channels: int = 32, **changes) -> Run:
    settings = {
        "name": "tiny",
        "data": DataConfig(
            source=Folder(str(root)), resolution=8, channels=1, augment=AugmentConfig(karras=0.12)
        ),
        "network": UNetConfig(
            channels=channels, multipliers=(1, 1), blocks=1, attention_depths=(1,), head_channels=32
        ),
        "conditioner": ContextConfig(category=CategoryConfig(size=8)),
        "optimizer": OptimizerConfig(warmup_steps=2),
        "batch_size": 8,
        "precision": "float32",
        "budget": Budget(steps=5),
        "log": LogConfig(every_steps=1),
        "validation": ValidationConfig(every_steps=100, samples=2, copy_samples=0),
        "preview": PreviewConfig(every_steps=100, num=1),
        "checkpoint": CheckpointConfig(every_steps=2, keep=2),
    }
    return Run(**{**settings, **changes})


def predicted(run: Run) -> tuple[CostEstimate, int]:
    """The prediction, and how many images there are to learn from."""
    prepared = prepare(run)
    return estimate_cost(prepared)[-1], len(prepared.dataset.training)


@pytest.mark.parametrize(
    "budget",
    [
        Budget(steps=49),
        Budget(samples=20),
        Budget(samples=41),
        Budget(epochs=2.5),
        Budget(epochs=0.1),
        Budget(steps=3, epochs=99),
    ],
)
def test_the_steps_are_those_that_the_budget_allows(root: Path, budget: Budget) -> None:
    run = tiny(root, budget=budget)
    found, size = predicted(run)
    taken = next(
        n
        for n in range(1, 1000)
        if budget.progress(steps=n, samples=8 * n, epochs=8 * n / size, seconds=0) >= 1
    )
    assert found.steps == taken
    assert found.epochs == pytest.approx(8 * taken / size)
    assert found.seconds == pytest.approx(taken * found.step_s + found.looks_s)


def test_a_budget_of_minutes_is_filled(root: Path) -> None:
    found, _ = predicted(tiny(root, budget=Budget(minutes=2)))
    assert found.seconds == pytest.approx(120, rel=0.05)
    assert found.steps > 50


def test_everything_predicted_is_positive(root: Path) -> None:
    found, _ = predicted(tiny(root))
    assert found.step_s > 0
    assert found.memory_gib > 0.05  # torch alone takes more
    assert found.disk_gib > 0
    assert found.epochs > 0


def test_larger_networks_and_more_checkpoints_need_more_disk(root: Path) -> None:
    small, _ = predicted(tiny(root))
    wide, _ = predicted(tiny(root, channels=64))
    many, _ = predicted(tiny(root, checkpoint=CheckpointConfig(keep=9)))
    assert small.disk_gib < wide.disk_gib
    assert small.disk_gib < many.disk_gib


def test_memory_covers_the_weights_their_average_and_the_moments(root: Path) -> None:
    small, _ = predicted(tiny(root))
    run = tiny(root, channels=192)
    wide, _ = predicted(run)
    assert wide.memory_gib >= small.memory_gib
    assert wide.memory_gib > 16 * network_parameters(run) / 2**30


def test_a_run_takes_the_steps_and_no_more_disk_than_predicted(root: Path, tmp_path: Path) -> None:
    run = tiny(root, budget=Budget(samples=41))
    found, _ = predicted(run)
    path = runs.train(run, run=tmp_path / "run")
    assert json.loads((path / "status.json").read_text())["step"] == found.steps
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert 0.2 * found.disk_gib < size / 2**30 <= found.disk_gib


def test_predicting_leaves_nothing_behind(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path / "here")
    predicted(tiny(root))
    assert list((tmp_path / "scratch").iterdir()) == list((tmp_path / "here").iterdir()) == []


# --- in words -------------------------------------------------------------------------------------

HOUR = CostEstimate(
    stage="diffusion model",
    step_s=0.5,
    steps=7200,
    seconds=3600.0,
    epochs=12.34,
    memory_gib=1.25,
    disk_gib=0.125,
)


def test_a_person_is_told_steps_time_views_memory_and_disk() -> None:
    assert HOUR.lines() == [
        "predicted: diffusion model, 7200 steps of 0.5 s, 1:00:00 total; each image is seen "
        "12.3 times",
        "predicted: diffusion model, 1.2 GiB of memory, 0.12 GiB of disk",
    ]
    assert (
        "1:00:00 total, including 5:00 for previews and validation; "
        in replace(HOUR, looks_s=300.0).lines()[0]
    )


@pytest.mark.parametrize(
    ("cadence", "seconds", "cost_s", "expected"),
    [
        (PreviewConfig(), 30.0, 1.0, 0),
        (PreviewConfig(), 60.0, 1.0, 1),
        (PreviewConfig(), 3600.0, 1.0, 12),
        (PreviewConfig(), 3600.0, 100.0, 2),  # 19 times as long as it takes, from one to the next
        (PreviewConfig(every_steps=10, every_minutes=None), 3600.0, 1.0, 9),
        (PreviewConfig(every_steps=200), 3600.0, 1.0, 12),
        (CheckpointConfig(), 299.0, 1.0, 0),
        (CheckpointConfig(), 3599.0, 1.0, 11),
    ],
)
def test_how_often_something_comes_due(
    cadence: Cadence, seconds: float, cost_s: float, expected: int
) -> None:
    """As often as by going through the training second by second."""
    steps, last_s, found = 100, 0.0, 0
    assert count_due(cadence, steps, seconds, cost_s) == expected
    for second in range(1, round(10 * seconds)):
        step = second * steps / (10 * seconds)
        if cadence.due(
            step=int(step) if step.is_integer() else 1,
            seconds=second / 10,
            last_s=last_s,
            cost_s=cost_s,
        ):
            last_s, found = second / 10, found + 1
    assert found == pytest.approx(expected, abs=1)


def test_previews_and_validation_take_their_time_from_the_steps(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = tiny(
        root,
        budget=Budget(minutes=2),
        preview=PreviewConfig(num=30),
        validation=ValidationConfig(samples=250, copy_samples=0),
    )
    seldom = tiny(root, budget=Budget(minutes=2))
    monkeypatch.setattr("sfumato.training.trainer.Trainer.measure_step", lambda self: 0.05)
    found, few = predicted(often)[0], predicted(seldom)[0]
    assert found.looks_s > 4 * few.looks_s
    assert found.seconds == pytest.approx(120, rel=0.05)
    assert found.steps * found.step_s == pytest.approx(found.seconds - found.looks_s)


def test_a_long_step_is_measured_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny(root)
    trainer = trial_trainer(prepare(run), root.parent / "scratch")
    taken: list[int] = []
    clock = itertools.count(0.0, 7.0)
    monkeypatch.setattr("sfumato.training.trainer.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr(trainer, "train_step", taken.append)
    assert trainer.measure_step() == 7.0
    assert len(taken) == 1


def test_an_autoencoder_is_predicted_before_its_diffusion_model(root: Path) -> None:
    own = TrainedAutoencoder(
        network=KLConfig(channels=(16, 16), latent_channels=2, blocks=1, groups=8),
        features="random",
        batch_size=4,
        precision="float32",
        budget=Budget(steps=7),
        validation=ValidationConfig(samples=2, copy_samples=0),
        preview=PreviewConfig(num=1),
    )
    run = tiny(root, autoencoder=own)
    found = estimate_cost(prepare(run))
    assert [(stage.stage, stage.steps) for stage in found] == [
        ("autoencoder", 7),
        ("diffusion model", 5),
    ]
