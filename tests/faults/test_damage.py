"""Damage beside the checkpoints is found, named, and mended or refused; it never gives another
result.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sfumato.recipes.run_config import is_as_written
from tests.faults.conftest import Case
from tests.faults.injector import flip, leftovers, newest
from tests.helpers.runs import fingerprint, images


def test_two_runs_left_alone_are_equal_and_another_seed_is_not(pixel: Case) -> None:
    """The negative control of everything here."""
    for seed, same in ((0, True), (1, False)):
        run = pixel.lab.new("control")
        code, said = pixel.lab.call("train", pixel.recipe, "--run", run, f"seed={seed}")
        assert code == 0, said
        assert (fingerprint(run) == pixel.end) is same


def test_a_killed_run_leaves_nothing_over(pixel: Case) -> None:
    run = pixel.killed()
    for place in ("", "checkpoints", "samples", "snapshots"):
        (run / place / ".tmp-something-00000000-1-00000000").mkdir(parents=True)
    pixel.ends_equal(run)
    assert [path for path in leftovers(run) if Path(path).parent != run] == []


def edit(run: Path, change: Callable[[str], str]) -> None:
    file = run / "config.yaml"
    text = file.read_text()
    assert change(text) != text
    file.write_text(change(text))


CONFIG_DAMAGE: dict[str, Callable[[Path], None]] = {
    "empty": lambda run: (run / "config.yaml").write_text(""),
    "cut": lambda run: os.truncate(
        run / "config.yaml", (run / "config.yaml").read_text().index("objective:")
    ),
    "edited": lambda run: edit(
        run, lambda text: text.replace("learning_rate: 0.001", "learning_rate: 0.01")
    ),
    "one bit": lambda run: edit(run, lambda text: text.replace("dropout: 0.1", "dropout: 0.3")),
    "binary": lambda run: (run / "config.yaml").write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGE)
def test_a_run_goes_on_with_what_it_was_trained_with(pixel: Case, damage: str) -> None:
    run = pixel.killed()
    CONFIG_DAMAGE[damage](run)
    said = pixel.ends_equal(run)
    assert "warning" in said
    assert "config.yaml" in said
    assert is_as_written((run / "config.yaml").read_text())


def test_a_setting_given_on_resume_is_kept_though_no_checkpoint_has_it_yet(pixel: Case) -> None:
    run = pixel.killed()
    child = pixel.lab.start("resume", run, "budget.steps=100000")
    child.until(lambda: "budget.steps" in child.said() and "resuming" in child.said())
    child.kill()
    child = pixel.lab.start("resume", run)
    child.until(lambda: newest(run).name > "step-000000020")
    child.kill()
    assert "is not what the run was trained with" not in child.said()


TORN: dict[str, Callable[[Path], object]] = {
    "status.json empty": lambda run: (run / "status.json").write_text(""),
    "status.json of another shape": lambda run: (run / "status.json").write_text("[1, 2]"),
    "metrics.jsonl cut": lambda run: os.truncate(
        run / "metrics.jsonl", (run / "metrics.jsonl").stat().st_size - 7
    ),
    "metrics.jsonl with zeros": lambda run: append(run / "metrics.jsonl", bytes(300)),
    "metrics.jsonl with a number": lambda run: append(run / "metrics.jsonl", b"12\n"),
    "metrics.jsonl with another step": lambda run: append(
        run / "metrics.jsonl", b'{"step": "ten"}\n'
    ),
    "looks.jsonl with a list": lambda run: append(run / "looks.jsonl", b"[]\n"),
    "data.json empty": lambda run: (run / "data.json").write_text(""),
    "lock of another machine": lambda run: (run / ".lock").write_text("1 elsewhere\n"),
}


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


@pytest.mark.parametrize("name", TORN)
def test_a_torn_small_file_changes_nothing(pixel: Case, name: str) -> None:
    run = pixel.killed()
    TORN[name](run)
    pixel.ends_equal(run)


@pytest.mark.parametrize("name", ["autoencoder/kept.json", "status.json"])
def test_a_torn_small_file_of_a_latent_run_changes_nothing(latent: Case, name: str) -> None:
    run = latent.killed()
    (run / name).write_text("")
    latent.ends_equal(run)


def test_the_stage_is_what_is_there_whatever_the_status_says(latent: Case) -> None:
    run = latent.killed(step=5, stage="autoencoder")
    (run / "status.json").write_text("")
    latent.ends_equal(run)


@pytest.mark.parametrize("damage", ["bit", "cut", "settings", "gone"])
def test_a_damaged_autoencoder_is_made_again(latent: Case, damage: str) -> None:
    run = latent.killed()
    final = run / "autoencoder" / "final"
    weights = final / "diffusion_pytorch_model.safetensors"
    if damage == "bit":
        flip(weights, 0.7)
    elif damage == "cut":
        os.truncate(weights, 3000)
    elif damage == "settings":
        flip(final / "latents.json", 0.1)
    else:
        shutil.rmtree(final)
    said = latent.ends_equal(run)
    if damage != "gone":
        assert "differs from what was saved" in said
        assert "the autoencoder is made again" in said
        assert (run / "autoencoder" / "final.corrupt").is_dir()


def test_an_autoencoder_that_was_exchanged_is_refused(latent: Case, pixel: Case) -> None:
    run, other = latent.killed(), latent.lab.new("other")
    code, said = latent.lab.call(
        "train", latent.recipe, "--run", other, "autoencoder.seed=3", "budget.steps=2"
    )
    assert code == 0, said
    shutil.rmtree(run / "autoencoder" / "final")
    shutil.copytree(other / "autoencoder" / "final", run / "autoencoder" / "final")
    code, said = latent.lab.call("resume", run)
    assert code == 2
    assert "the autoencoder is not the one that this run was trained with" in said


def killed_in_own_cache(case: Case) -> Path:
    """Return a run that was killed after its checkpoint of step 4."""
    run = case.lab.new("cached")
    child = case.lab.start("train", case.recipe, "--run", run)
    child.until(lambda: newest_step(run) >= 4)
    child.kill()
    return run


def stored(cache: Path, kind: str) -> Path:
    (file,) = [path for path in cache.glob(f"{kind}/*/segment-*/*.bin") if "thumb" not in path.name]
    return file


@pytest.mark.parametrize("damage", ["bit", pytest.param("zeros", marks=pytest.mark.slow), "cut"])
def test_damaged_pixels_in_the_cache_are_decoded_again(
    pixel: Case, own_cache: Callable[[], Path], damage: str
) -> None:
    run = killed_in_own_cache(pixel)
    file = stored(own_cache(), "pixels")
    if damage == "bit":
        flip(file, 0.4)
    elif damage == "zeros":
        file.write_bytes(bytes(file.stat().st_size))
    else:
        os.truncate(file, file.stat().st_size - 10)
    said = pixel.ends_equal(run)
    assert damage == "cut" or "stored pixels differ from what was written" in said


def newest_step(run: Path) -> int:
    found = sorted((run / "checkpoints").glob("step-?????????"))
    return int(found[-1].name[5:]) if found else -1


@pytest.mark.parametrize("damage", ["bit", pytest.param("zeros", marks=pytest.mark.slow)])
def test_damaged_latents_in_the_cache_are_named_and_made_again(
    latent: Case, own_cache: Callable[[], Path], damage: str
) -> None:
    run = killed_in_own_cache(latent)
    file = stored(own_cache(), "latents")
    if damage == "bit":
        flip(file, 0.4)
    else:
        file.write_bytes(bytes(file.stat().st_size))
    code, said = latent.lab.call("resume", run)
    if code == 0:  # the row was not needed any more
        assert damage == "bit"
    else:
        assert code == 2
        assert "differ from what was written (check value)" in said
        latent.ends_equal(run)
    assert fingerprint(run) == latent.end


def test_leftovers_of_another_run_are_refused(pixel: Case) -> None:
    run = pixel.killed()
    (run / "config.yaml").unlink()
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    code, said = pixel.lab.call("train", pixel.recipe, "--run", run, "seed=5")
    assert code == 2
    assert "there are checkpoints of an earlier run here" in said
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before


def test_damaged_checkpoints_fall_back_end_to_end(pixel: Case) -> None:
    run = pixel.killed()
    flip(newest(run) / "ema.safetensors")
    said = pixel.ends_equal(run)
    assert "differs from what was saved" in said
    assert list((run / "checkpoints").glob("*.corrupt"))


def test_no_whole_checkpoint_restarts_nothing(pixel: Case) -> None:
    run = pixel.killed()
    for path in (run / "checkpoints").glob("step-*"):
        os.truncate(path / "model.safetensors", 10)
    for _ in range(2):  # the second time, all are set aside
        code, said = pixel.lab.call("resume", run)
        assert code == 2
        assert "no usable checkpoint" in said


def test_two_processes_never_train_in_one_run(pixel: Case) -> None:
    run = pixel.killed()
    child = pixel.lab.start("resume", run, "budget.steps=100000")
    child.until(lambda: "resuming" in child.said())
    code, said = pixel.lab.call("resume", run)
    child.kill()
    assert code == 2
    assert f"another process is training here: process {child.pid} on" in said
    pixel.ends_equal(pixel.killed())


def test_data_that_changed_are_named(pixel: Case, tmp_path: Path) -> None:
    folder = images(tmp_path / "images", size=8)
    run = pixel.lab.new("changing")
    code, said = pixel.lab.call(
        "train", pixel.recipe, "--run", run, f"data.source.path={folder}", "budget.steps=4"
    )
    assert code == 0, said
    shutil.copy(folder / "even" / "000.png", folder / "even" / "new.png")
    code, said = pixel.lab.call("resume", run, "budget.steps=8")
    assert code == 2
    assert "--accept-data-change" in said
    json.loads((run / "status.json").read_text())
