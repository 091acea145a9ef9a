"""`sfumato doctor RUN` finds what is wrong with a run, says what mends it, and changes nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sfumato.runs import checkup
from tests.faults.conftest import Case
from tests.faults.injector import flip, has_step, newest


def examined(case: Case, run: Path) -> tuple[int, dict[str, Any]]:
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file())
    code, said = case.lab.call("doctor", run, "--json")
    after = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file())
    assert before == after
    return code, {check["what"]: check for check in json.loads(said[said.index("[\n") :])}


def test_a_finished_run_is_well(latent: Case) -> None:
    code, found = examined(latent, latent.lab.place / "alone")
    assert code == 0, found
    assert {"lock", "status", "configuration", "autoencoder", "free space", "disk"} <= found.keys()
    assert found["step-000000016"]["found"].startswith("whole and finite")
    assert found["disk"]["found"] == "can rename folders, append, sync, lock"


def not_finite(run: Path) -> None:
    from tests.faults.test_strangers import poison, reseal

    poison(newest(run))
    reseal(newest(run))


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a checkpoint": (
        lambda run: flip(newest(run) / "model.safetensors"),
        "step-000000016",
        "differs from what was saved",
    ),
    "weights": (not_finite, "step-000000016", "not finite"),
    "the autoencoder": (
        lambda run: flip(run / "autoencoder/final/diffusion_pytorch_model.safetensors"),
        "autoencoder",
        "differs from what was saved",
    ),
    "the configuration": (
        lambda run: os.truncate(run / "config.yaml", 900),
        "configuration",
        "was cut, edited or damaged",
    ),
    "the status": (
        lambda run: (run / "status.json").write_text(""),
        "status",
        "missing or damaged",
    ),
    "all checkpoints": (
        lambda run: [flip(path / "ema.safetensors") for path in run.glob("checkpoints/step-*")],
        "checkpoints",
        "none is whole",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_with_its_remedy(latent: Case, name: str) -> None:
    run = latent.lab.new("damaged")
    shutil.copytree(latent.lab.place / "alone", run)
    damage, what, found = DAMAGE[name]
    damage(run)
    code, checks = examined(latent, run)
    assert code == 2
    assert not checks[what]["ok"]
    assert found in checks[what]["found"]
    assert checks[what]["remedy"]


def test_a_damaged_cache_is_named(pixel: Case, own_cache: Callable[[], Path]) -> None:
    run = pixel.lab.new("cached")
    code, said = pixel.lab.call("train", pixel.recipe, "--run", run)
    assert code == 0, said
    assert examined(pixel, run)[0] == 0
    (file,) = own_cache().glob("pixels/*/segment-*/pixels-*.bin")
    file.write_bytes(bytes(file.stat().st_size))
    code, checks = examined(pixel, run)
    assert code == 2
    assert str(file.parent) in checks["cached pixels"]["found"]


def test_a_running_and_a_killed_run_are_told_apart(pixel: Case) -> None:
    run = pixel.lab.new("running")
    child = pixel.lab.start("train", pixel.recipe, "--run", run, "budget.steps=100000")
    child.until(lambda: has_step(run, 3))
    code, said = pixel.lab.call("doctor", run)
    assert f"lock: held: process {child.pid} on" in said
    child.kill()
    code, said = pixel.lab.call("doctor", run)
    assert code == 2
    assert "but no process does" in said
    assert f"`sfumato resume {run}` goes on" in said


def test_a_disk_that_cannot_rename_is_named(
    pixel: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As mounted object stores cannot."""

    def refuse(*arguments: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(checkup.os, "replace", refuse)
    checks = {check.what: check for check in checkup.check_run(pixel.lab.place / "alone")}
    assert checks["disk"].found == "cannot rename folders"
    assert "train on a local disk" in checks["disk"].remedy


def test_what_is_no_run_is_said(pixel: Case, tmp_path: Path) -> None:
    code, said = pixel.lab.call("doctor", tmp_path)
    assert code == 2
    assert "is not a run" in said
