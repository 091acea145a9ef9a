"""A run that was interrupted and resumed ends as the one that was not: weights, average, optimizer
and losses, bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from sfumato import randomness
from sfumato.data import AugmentConfig, BatchPlan, DataConfig, Folder, batch_plan
from sfumato.errors import CheckpointError, ConfigError, DivergedError, RunError, SfumatoError
from sfumato.networks import UNet
from sfumato.observability.metrics_file import MetricsFile
from sfumato.process.signals import Interrupted
from sfumato.recipes.resolver import resolve
from sfumato.runs import resume, train
from sfumato.storage import checkpoint
from sfumato.storage.run_directory import RunDirectory
from sfumato.training import Budget, MuonConfig, Trainer, guard
from tests.helpers.runs import fingerprint, images, tiny_run


class Crash(BaseException):
    """The process is gone: nothing catches this."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return fingerprint(train(tiny_run(folder), run=tmp_path_factory.mktemp("whole") / "run"))


@pytest.fixture(scope="module")
def stopped(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that crashed after six steps, one after its checkpoint; tests work on copies."""
    with pytest.MonkeyPatch.context() as patch:
        return interrupted(tiny_run(folder), tmp_path_factory.mktemp("stopped") / "run", patch, 6)


def crash_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    real, left = Trainer.train_step, [steps]

    def step(self, batch):
        if not left[0]:
            raise Crash
        left[0] -= 1
        return real(self, batch)

    monkeypatch.setattr(Trainer, "train_step", step)


def interrupted(settings, run: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> Path:
    with monkeypatch.context() as patch:
        crash_after(patch, after)
        with pytest.raises(Crash):
            train(settings, run=run)
    return run


@pytest.mark.parametrize(
    "after", [3, 8, *(pytest.param(step, marks=pytest.mark.slow) for step in (5, 13))]
)
def test_resumed_run_equals_the_uninterrupted_one(
    folder, whole, tmp_path, monkeypatch, after
) -> None:
    run = interrupted(tiny_run(folder), tmp_path / "run", monkeypatch, after)
    assert fingerprint(resume(run)) == whole
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def test_a_run_that_takes_shards_in_windows_is_resumed_in_its_order(
    folder, whole, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("sfumato.data.dataset.SINGLE", 8)
    settings = tiny_run(folder)
    windowed = replace(settings, data=replace(settings.data, shuffle="window", window=2))
    expected = fingerprint(train(windowed, run=tmp_path / "whole"))
    assert expected != whole
    run = interrupted(windowed, tmp_path / "run", monkeypatch, 8)
    with pytest.raises(CheckpointError, match=r"data\.window are not"):
        resume(run, overrides=["data.window=3"])
    assert fingerprint(resume(run)) == expected


def test_interrupted_twice_still_equals(stopped, whole, tmp_path, monkeypatch) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    with monkeypatch.context() as patch:
        crash_after(patch, 6)
        with pytest.raises(Crash):
            resume(run)
    assert fingerprint(resume(run)) == whole


@pytest.mark.parametrize("step", [7, pytest.param(8, marks=pytest.mark.slow)])
def test_a_signal_where_a_preview_or_validation_is_due_loses_neither(
    folder, whole, tmp_path, monkeypatch, step
) -> None:
    real = Trainer.train_step

    def signalled(self, batch):
        result = real(self, batch)
        if self.state.counters.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", signalled)
        with pytest.raises(Interrupted):
            train(tiny_run(folder), run=tmp_path / "run")
    assert bool(list((tmp_path / "run" / "samples").glob("*00007"))) == (step > 7)
    assert fingerprint(resume(tmp_path / "run")) == whole
    assert list((tmp_path / "run" / "samples").glob("*00007"))


def test_negative_control_other_data_order_differs(stopped, whole, tmp_path, monkeypatch) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    real = BatchPlan.batch
    monkeypatch.setattr(BatchPlan, "batch", lambda self, step, **of: real(self, step + 1, **of))
    changed = fingerprint(resume(run))
    assert changed["step"] == whole["step"]
    assert all(changed[name] != whole[name] for name in ("model", "ema", "optimizer", "losses"))


@pytest.mark.parametrize("version", [1, None])
def test_a_run_from_before_plans_had_versions_goes_on_in_its_order(
    folder, whole, tmp_path, monkeypatch, version
) -> None:
    """Such a checkpoint names no version; the newest one differs here, which is the control."""
    real = checkpoint.save

    def save(folder, *tensors, state, **options):
        plain = {name: value for name, value in state.items() if name != "plan_version"}
        return real(folder, *tensors, state=plain, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        patch.setattr("sfumato.data.dataset.BatchPlan", partial(BatchPlan, version=1))
        run = interrupted(tiny_run(folder), tmp_path / "run", patch, 6)
    monkeypatch.setattr(randomness, "MOST_PERMUTED", 0)
    if version is None:
        monkeypatch.setitem(batch_plan.ORDERS, 1, batch_plan.ORDERS[2])
    assert (fingerprint(resume(run)) == whole) == (version == 1)


@pytest.mark.parametrize("kept", [{}, {"memory_gib": 0.0, "workers": 2}])
def test_workers_cache_and_memory_do_not_change_the_run(
    folder, whole, tmp_path, monkeypatch, kept
) -> None:
    data = DataConfig(
        source=Folder(str(folder)),
        resolution=8,
        channels=1,
        augment=AugmentConfig(flip="horizontal"),
        cache="off",
        **kept,
    )
    run = interrupted(tiny_run(folder, data=data), tmp_path / "run", monkeypatch, 7)
    assert fingerprint(resume(run)) == whole


def test_previews_and_validation_do_not_move_training(folder, whole, tmp_path) -> None:
    from sfumato.training import PreviewConfig, ValidationConfig

    settings = tiny_run(
        folder,
        preview=PreviewConfig(every_steps=1, num=1),
        validation=ValidationConfig(every_steps=1, samples=10, copy_samples=0),
    )
    watched = fingerprint(train(settings, run=tmp_path / "run"))
    assert all(watched[name] == whole[name] for name in ("model", "ema", "optimizer", "losses"))


def test_accumulation_changes_only_rounding(folder, tmp_path) -> None:
    from sfumato.networks import UNetConfig

    plain = UNetConfig(
        channels=32, multipliers=(1, 1), blocks=1, attention_depths=(1,), head_channels=32
    )
    losses = []
    for number, size in enumerate((8, 3)):
        settings = tiny_run(folder, network=plain, micro_batch=size, budget=Budget(steps=6))
        run = train(settings, run=tmp_path / str(number))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append(torch.tensor([line["train/loss"] for line in lines if "train/loss" in line]))
    torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=1e-4)


def test_another_seed_is_another_run(folder, tmp_path) -> None:
    short = Budget(steps=2)
    first, same, other = (
        fingerprint(train(tiny_run(folder, seed=seed, budget=short), run=tmp_path / str(number)))
        for number, seed in enumerate((0, 0, 1))
    )
    assert first == same
    assert other["model"] != first["model"]


def test_resume_without_a_checkpoint_is_an_error(folder, tmp_path, monkeypatch) -> None:
    run = interrupted(tiny_run(folder), tmp_path / "run", monkeypatch, 0)
    for path in checkpoint.paths(run / "checkpoints"):
        path.rename(path.with_suffix(".gone"))
    with pytest.raises(CheckpointError, match="nothing is restarted silently"):
        resume(run)


def test_resume_of_no_run_and_train_over_a_run_are_errors(folder, tmp_path, monkeypatch) -> None:
    with pytest.raises(RunError, match=r"config\.yaml"):
        resume(tmp_path)
    run = interrupted(tiny_run(folder), tmp_path / "run", monkeypatch, 0)
    with pytest.raises(RunError, match="sfumato resume"):
        train(tiny_run(folder), run=run)


def test_changed_data_are_refused_on_resume(tmp_path, monkeypatch) -> None:
    folder = images(tmp_path / "images")
    run = interrupted(tiny_run(folder), tmp_path / "run", monkeypatch, 6)
    before = described(run)
    next(folder.rglob("*.png")).unlink()
    with pytest.raises(CheckpointError, match="data are not what"):
        resume(run)
    assert described(run) == before


def described(run: Path) -> list[str]:
    return [(run / name).read_text() for name in ("config.yaml", "data.json", "environment.json")]


REFUSED = {
    "network.channels=64": "does not fit the model",
    "seed=1": "seed, batch_size",
    "optimizer.muon={}": "was not optimized by Muon in the checkpoint, but is with the current "
    "configuration",
    "network.multipliers=[1,1,1,1,1]": "does not fit the model",
    "checkpoint.keep=1000000000": "GiB needed for checkpoints",
}


def test_refused_resumes_leave_the_run_as_it_was(stopped, whole, tmp_path) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    before = described(run)
    for override, said in REFUSED.items():
        with pytest.raises(SfumatoError, match=said):
            resume(run, overrides=[override])
        assert described(run) == before, override
    assert fingerprint(resume(run)) == whole


def test_a_run_that_fitted_on_the_disk_is_resumed_on_it(folder, tmp_path, monkeypatch) -> None:
    """What lies there already is not asked for again."""
    asked: list[int] = []
    monkeypatch.setattr(
        RunDirectory, "require_space", lambda self, needed: asked.append(needed - (16 << 20))
    )
    run = interrupted(tiny_run(folder), tmp_path / "run", monkeypatch, 11)
    # as many as are kept: one more is written before one goes
    assert len(checkpoint.paths(run / "checkpoints")) == 2
    kept = len(list((run / "best").glob("step-*")))
    resume(run)
    first, *later = asked
    size = first // (3 * 4 + 2)  # three checkpoints of four parts, and two files in best/
    assert set(later) == {size * (4 + 2 - kept)}


def test_a_disk_that_is_full_for_a_while_does_not_end_a_run(
    folder, whole, tmp_path, monkeypatch, capsys
) -> None:
    real, count = MetricsFile.write, [0]

    def full(self, record):
        count[0] += 1
        if count[0] in (3, 4, 6):
            raise OSError(28, "No space left on device")
        real(self, record)

    monkeypatch.setattr(MetricsFile, "write", full)
    run = train(tiny_run(folder), run=tmp_path / "run")
    assert "No space left on device" in capsys.readouterr().err
    found = fingerprint(run)
    assert {name: found[name] for name in ("model", "ema", "optimizer")} == {
        name: whole[name] for name in ("model", "ema", "optimizer")
    }


def test_what_ends_a_run_is_told_though_the_disk_is_full(folder, tmp_path, monkeypatch) -> None:
    real, refused = RunDirectory.write_status, []

    def full(self, state, step, **more):
        if state == "failed":
            refused.append(step)
            raise OSError(28, "No space left on device")
        real(self, state, step, **more)

    monkeypatch.setattr(RunDirectory, "write_status", full)
    crash_after(monkeypatch, 2)
    with pytest.raises(Crash):  # and not what the disk says
        train(tiny_run(folder), run=tmp_path / "run")
    assert refused == [2]
    assert RunDirectory.existing(tmp_path / "run").status()["state"] == "running"


def test_held_out_images_are_measured_in_micro_batches(folder, tmp_path, monkeypatch) -> None:
    """A batch that is too large for the memory in one go is so there, too."""
    sizes: list[int] = []
    real = UNet.forward

    def seen(self, x, *rest):
        sizes.append(len(x))
        return real(self, x, *rest)

    monkeypatch.setattr(UNet, "forward", seen)
    train(tiny_run(folder, budget=Budget(steps=4)), run=tmp_path / "run")
    assert max(sizes) == 5


def test_muon_cannot_be_left_on_resume(folder, tmp_path, monkeypatch) -> None:
    settings = tiny_run(folder)
    settings = replace(settings, optimizer=replace(settings.optimizer, muon=MuonConfig()))
    run = interrupted(settings, tmp_path / "run", monkeypatch, 6)
    with pytest.raises(
        CheckpointError,
        match="was optimized by Muon in the checkpoint, but not with the current configuration",
    ):
        resume(run, overrides=["optimizer.muon=null"])


def test_override_on_resume_is_shown_and_kept(stopped, tmp_path, capsys) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    resume(run, overrides={"budget.steps": 16})
    assert "budget.steps: 14 -> 16" in capsys.readouterr().err
    assert resolve(run).budget.steps == 16
    assert checkpoint.paths(run / "checkpoints")[0].name == "step-000000016"


def test_a_finished_run_says_so_and_is_left_alone(folder, tmp_path, capsys) -> None:
    run = train(tiny_run(folder, budget=Budget(steps=2)), run=tmp_path / "run")
    before = (run / "metrics.jsonl").read_text()
    assert resume(run) == run
    assert "finished already, at step 2;" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_text() == before


def test_two_processes_never_share_a_run(stopped, tmp_path) -> None:
    """Nor is anything of a run touched that another process holds."""
    run = shutil.copytree(stopped, tmp_path / "run")
    with RunDirectory.existing(run).locked():
        (run / "checkpoints" / ".tmp-7-being-written").mkdir()
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
        with pytest.raises(RunError, match=rf"another process .* process {os.getpid()}, this one"):
            resume(run, overrides={"budget.steps": 16})
    assert {
        path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"
    } == before


def test_nan_is_skipped_and_too_many_stop_the_run(folder, tmp_path, monkeypatch) -> None:
    real = Trainer._backward

    def poisoned(self, batch, denoiser):
        losses = real(self, batch, denoiser)
        if self.state.counters.step >= 3:
            return losses._replace(per_sample=losses.per_sample * float("nan"))
        return losses

    monkeypatch.setattr(Trainer, "_backward", poisoned)
    with pytest.raises(DivergedError, match="learning_rate") as caught:
        train(tiny_run(folder, budget=Budget(steps=120)), run=tmp_path / "run")
    assert caught.value.exit_code == 3
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    skipped = [line["train/skipped"] for line in lines if "train/skipped" in line]
    assert skipped[:3] == [0, 0, 0]
    assert skipped[-1] == guard.SKIPS_IN_A_ROW - 1
    (first,) = checkpoint.paths(tmp_path / "run" / "checkpoints")
    assert first.name == "step-000000000"  # none is saved while steps are skipped
    assert len(list((tmp_path / "run" / "incidents").iterdir())) == guard.MAX_ROLLBACKS + 1


def test_a_run_that_diverged_goes_on_from_before_its_loss_rose(folder, tmp_path) -> None:
    """Its checkpoints of overflowing weights lie aside, so that the lower learning rate that is
    advised has something to learn from.
    """
    wild = {
        "optimizer.learning_rate": 1e6,
        "budget.steps": 120,
        "checkpoint.every_steps": 4,
        "batch_size": 4,
        "validation.every_steps": 100,
        "preview.every_steps": 100,
    }
    with pytest.raises(DivergedError, match=r"resume .* begins at step \d+, before the loss rose"):
        train(tiny_run(folder), run=tmp_path / "run", overrides=wild)
    root = tmp_path / "run" / "checkpoints"
    sound = checkpoint.paths(root)
    assert sound
    assert all(checkpoint.load(path).state["counters"]["skipped"] == 0 for path in sound)
    assert list(root.glob("*.diverged"))
    resume(tmp_path / "run", overrides={"optimizer.learning_rate": 1e-4, "budget.steps": 24})
    newest = checkpoint.load(checkpoint.paths(root)[0]).state["counters"]
    assert newest["step"] == 24
    assert newest["skipped"] == 0


def test_categories_asked_of_flat_data_are_refused(tmp_path) -> None:
    folder = images(tmp_path / "images")
    with pytest.raises(ConfigError, match=r"set conditioner\.category=null"):
        train(tiny_run(folder / "even"), run=tmp_path / "run")
