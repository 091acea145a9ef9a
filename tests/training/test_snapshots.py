"""Snapshots: averaged weights kept for good at powers of two, found again by step, and no part of
what resuming needs.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sfumato.errors import CheckpointError, RunError
from sfumato.runs import load, resume, snapshot, train
from sfumato.storage import checkpoint
from sfumato.training import Budget, CheckpointConfig, Trainer, hooks
from tests.helpers.runs import fingerprint, images, tiny_run

STEPS = frozenset({2, 4, 8, 64})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen steps with snapshots at 2, 4 and 8, and checkpoints at 4, 8, 12 and 14."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks, "SNAPSHOTS", STEPS)
        settings = tiny_run(folder, checkpoint=CheckpointConfig(every_steps=4, keep=10))
        return train(settings, run=tmp_path_factory.mktemp("runs") / "run")


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return checkpoint.load_snapshot(run / "snapshots", step=step)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def said(root: Path, step: int) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_snapshot(root, step=step)
    return caught.value


def test_they_are_taken_at_powers_of_two() -> None:
    assert sorted(hooks.SNAPSHOTS)[:4] == [256, 512, 1024, 2048]
    assert all(step & (step - 1) == 0 for step in hooks.SNAPSHOTS)
    assert max(hooks.SNAPSHOTS) > 10**11


def test_a_run_keeps_those_that_it_reaches(run: Path) -> None:
    names = sorted(path.name for path in (run / "snapshots").iterdir())
    assert names == [f"step-{step:09d}.safetensors" for step in (2, 4, 8)]


@pytest.mark.parametrize("step", [4, 8])
def test_they_hold_the_averaged_weights_of_their_step(run: Path, step: int) -> None:
    whole = checkpoint.load(run / "checkpoints" / f"step-{step:09d}")
    assert same(weights(run, step), whole.tensors["ema"])
    assert not same(weights(run, step), whole.tensors["model"])


@pytest.mark.parametrize(
    ("step", "found"), [(2, 2), (3, 2), (4, 4), (7, 4), (8, 8), (9, 8), (10**12, 8)]
)
def test_the_nearest_before_is_found(run: Path, step: int, found: int) -> None:
    assert same(
        weights(run, step),
        load_file(run / "snapshots" / f"step-{found:09d}.safetensors"),
    )


@pytest.mark.parametrize("step", [1, 0, -5])
def test_none_before_names_those_that_there_are(run: Path, step: int) -> None:
    error = said(run / "snapshots", step)
    assert (
        str(error)
        == f"{run}/snapshots: no snapshot at or before step {step}\n  hint: there are 2, 4, 8"
    )


def test_a_folder_without_any_says_so(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "nowhere"):
        assert (
            str(said(root, 5))
            == f"{root}: no snapshot at or before step 5\n  hint: there are none yet"
        )


def test_other_files_are_not_snapshots(tmp_path: Path) -> None:
    for name in (
        ".tmp-7-abc",
        "step-7.safetensors",
        "step-000000007.safetensors.bak",
        "step-00000000x.safetensors",
    ):
        (tmp_path / name).write_bytes(b"")
    assert "there are none yet" in said(tmp_path, 9).hint


@pytest.mark.parametrize("damage", [b"", b"\xff" * 100, b"\x08\0\0\0\0\0\0\0{}      garbage"])
def test_a_damaged_one_is_named(tmp_path: Path, damage: bytes) -> None:
    path = checkpoint.save_snapshot(tmp_path, step=16, weights={"w": torch.ones(3)})
    path.write_bytes(damage)
    if damage.endswith(b"garbage"):
        path.write_bytes(damage[:8] + b"{" * 8)
    error = said(tmp_path, 20)
    assert "cannot be read" in error.what
    assert error.where == str(path)


def test_saving_leaves_one_whole_file_and_what_is_saved_comes_back(tmp_path: Path) -> None:
    values = {"a.b": torch.randn(3, 4).T, "c": torch.arange(5)}
    path = checkpoint.save_snapshot(tmp_path / "deep" / "er", step=1234, weights=values)
    assert [file.name for file in path.parent.iterdir()] == ["step-000001234.safetensors"]
    assert same(checkpoint.load_snapshot(path.parent, step=1234), values)


def test_a_place_that_cannot_be_written_is_an_error_that_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match="could not be written"):
        checkpoint.save_snapshot(tmp_path / "file", step=1, weights={"w": torch.ones(3)})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(CheckpointError, match="free some disk space"):
        checkpoint.save_snapshot(tmp_path / "root", step=1, weights={"w": torch.ones(3)})
    assert list((tmp_path / "root").iterdir()) == []


def test_a_full_disk_does_not_end_the_run(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(root: Path, **_: object) -> Path:
        raise CheckpointError(
            "could not be written: No space left on device",
            where=str(root),
            hint="free some disk space",
        )

    monkeypatch.setattr(hooks, "SNAPSHOTS", STEPS)
    monkeypatch.setattr(checkpoint, "save_snapshot", full)
    run = train(tiny_run(folder, budget=Budget(steps=5)), run=tmp_path / "run")
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert "warning: " in capsys.readouterr().err


def test_resuming_does_not_need_them_and_is_not_moved_by_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fingerprint(train(tiny_run(folder), run=tmp_path / "whole"))
    monkeypatch.setattr(hooks, "SNAPSHOTS", STEPS)
    run = _stopped(folder, tmp_path / "run", monkeypatch, after=7)
    assert sorted(path.stem for path in (run / "snapshots").iterdir()) == [
        "step-000000002",
        "step-000000004",
    ]
    (run / "snapshots" / "step-000000002.safetensors").unlink()
    assert fingerprint(resume(run)) == whole
    assert sorted(path.stem for path in (run / "snapshots").iterdir()) == [
        "step-000000004",
        "step-000000008",
    ]


def _stopped(folder: Path, run: Path, monkeypatch: pytest.MonkeyPatch, *, after: int) -> Path:
    """A run whose process ends after so many steps."""
    real, left = Trainer.train_step, [after]

    def step(self, batch):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_run(folder), run=run)
    return run


def test_the_model_of_a_step_is_the_run_as_it_was(run: Path) -> None:
    model = snapshot(run, 5)
    assert same(dict(model.state_dict()), weights(run, 4))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_images_can_be_led_away_from_it(run: Path) -> None:
    pipeline, worse = load(run), snapshot(run, 2)
    asked = {"category": "odd"}
    plain = pipeline.sample(2, **asked, steps=3)
    assert (
        pipeline.sample(2, **asked, steps=3, autoguidance=(worse, 1.0)) - plain
    ).abs().max() < 1e-5
    assert (
        pipeline.sample(2, **asked, steps=3, autoguidance=(worse, 4.0)) - plain
    ).abs().max() > 1e-4


def test_no_run_and_no_snapshot_are_errors(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run"):
        snapshot(tmp_path, 5)
    with pytest.raises(CheckpointError, match="there are 2, 4, 8"):
        snapshot(run, 1)
