"""The commit protocol: whole or not there, whatever happens while writing, and damage is found,
kept aside and told of.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch

from sfumato.errors import CheckpointError
from sfumato.storage import atomic, checkpoint, manifest
from sfumato.training.state import Counters


class Crash(BaseException):
    """The process is gone."""


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"w": torch.full((50,), value)},
        "optimizer": {},
        "ema": {"w": torch.full((50,), -value)},
    }


def save(root: Path, step: int, keep: int = 2) -> Path:
    return checkpoint.save(
        root, step=step, state={"at": step}, tensors=tensors(float(step)), keep=keep
    )


def test_what_is_saved_is_read_back(tmp_path) -> None:
    loaded = checkpoint.load(save(tmp_path, 7))
    assert loaded.state == {"at": 7}
    assert torch.equal(loaded.tensors["model"]["w"], torch.full((50,), 7.0))
    assert loaded.tensors["optimizer"] == {}
    assert (tmp_path / "latest").read_text() == "step-000000007\n"


def test_newest_is_kept_and_old_ones_go(tmp_path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    assert [path.name for path in checkpoint.paths(tmp_path)] == [
        "step-000000004",
        "step-000000003",
    ]


def _fault(module, name: str, when: int):
    real, calls = getattr(module, name), [0]

    def fail(*args, **kwargs):
        calls[0] += 1
        if calls[0] == when:
            raise Crash
        return real(*args, **kwargs)

    return fail


@pytest.mark.parametrize(
    ("module", "name", "when"),
    [
        (checkpoint, "save_file", 1),
        (checkpoint, "save_file", 2),
        (checkpoint.json, "dumps", 1),
        (checkpoint.json, "dumps", 2),
        (manifest, "file_digest", 1),
        (atomic, "sync", 1),
        (atomic, "sync", 6),
        (atomic.os, "replace", 1),
        (checkpoint, "_point_latest", 1),
        (checkpoint.shutil, "rmtree", 1),
    ],
)
def test_a_crash_anywhere_in_the_writer_leaves_a_whole_checkpoint(
    tmp_path, monkeypatch, module, name, when
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, _fault(module, name, when))
        with pytest.raises(Crash):
            save(tmp_path, 3)
    atomic.sweep(tmp_path, held=True)
    loaded, warnings = checkpoint.load_newest(tmp_path)
    assert warnings == []
    assert loaded.state["at"] in (2, 3)
    assert torch.equal(loaded.tensors["model"]["w"], torch.full((50,), float(loaded.state["at"])))
    assert list(tmp_path.glob(".tmp-*")) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_prunes_nothing_and_says_so(tmp_path, monkeypatch, number) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)

    def full(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match="free some disk space"):
        save(tmp_path, 3, keep=1)
    assert len(checkpoint.paths(tmp_path)) == 2
    assert list(tmp_path.glob(".tmp-*")) == []


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def zero(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))


def flip(path: Path) -> None:
    file = path / "ema.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(bytes(data))


def no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def half_manifest(path: Path) -> None:
    file = path / "manifest.json"
    file.write_text(file.read_text()[:40])


def no_shard(path: Path) -> None:
    (path / "optimizer.safetensors").unlink()


def swap(path: Path) -> None:
    shutil.copy(path / "model.safetensors", path / "ema.safetensors")


@pytest.mark.parametrize(
    "damage", [truncate, zero, flip, no_manifest, half_manifest, no_shard, swap]
)
def test_damage_falls_back_loudly_and_deletes_nothing(tmp_path, damage) -> None:
    save(tmp_path, 1)
    bad = save(tmp_path, 2)
    damage(bad)
    with pytest.raises(CheckpointError, match="step-000000002"):
        checkpoint.load(bad)
    loaded, warnings = checkpoint.load_newest(tmp_path)
    assert loaded.state["at"] == 1
    assert "step-000000002" in warnings[0]
    assert (tmp_path / "step-000000002.corrupt").is_dir()


@pytest.mark.parametrize(
    "damage", [truncate, zero, flip, no_manifest, half_manifest, no_shard, swap]
)
def test_a_reader_passes_over_damage_and_changes_nothing(tmp_path, damage) -> None:
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    loaded, warnings = checkpoint.read_newest(tmp_path)
    assert loaded.state["at"] == 1
    (warning,) = warnings
    assert "step-000000002" in warning
    assert warning.endswith("skipped; step 1 is used")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_reader_of_nothing_whole_is_told_what_to_do(tmp_path) -> None:
    with pytest.raises(
        CheckpointError, match=r"holds no checkpoint yet\n  hint: wait for the first one"
    ):
        checkpoint.read_newest(tmp_path)
    for step in (1, 2):
        flip(save(tmp_path, step))
    with pytest.raises(
        CheckpointError,
        match=r"none of 2 checkpoint\(s\) is intact; .*step-000000002.*\n  hint: copy an intact one",
    ) as caught:
        checkpoint.read_newest(tmp_path)
    assert all(f"step-00000000{step}" in str(caught.value) for step in (1, 2))
    assert len(checkpoint.paths(tmp_path)) == 2


def test_a_checkpoint_of_another_version_is_left_as_it_is(tmp_path) -> None:
    save(tmp_path, 1)
    other = save(tmp_path, 2)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "schema": 99}))
    with pytest.raises(CheckpointError, match="another version of sfumato"):
        checkpoint.load_newest(tmp_path)
    assert sorted(path.name for path in checkpoint.paths(tmp_path)) == [
        "step-000000001",
        "step-000000002",
    ]


def test_a_file_that_cannot_be_read_counts_as_damaged(tmp_path, monkeypatch) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    real = manifest.file_digest

    def bad_sector(file: Path) -> str:
        if "step-000000002" in str(file):
            raise OSError(5, "Input/output error")
        return real(file)

    monkeypatch.setattr(manifest, "file_digest", bad_sector)
    loaded, warnings = checkpoint.load_newest(tmp_path)
    assert loaded.state["at"] == 1
    assert "Input/output error" in warnings[0]


def test_empty_latest_does_not_matter(tmp_path) -> None:
    save(tmp_path, 4)
    (tmp_path / "latest").write_text("")
    assert checkpoint.load_newest(tmp_path)[0].state["at"] == 4


def test_nothing_usable_is_an_error(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        checkpoint.load_newest(tmp_path)


def test_state_is_json_that_any_reader_takes_infinities_included(tmp_path) -> None:
    state = {"interval": [-math.inf, math.inf], "facts": {"means": [math.nan, 1.5]}}
    path = checkpoint.save(tmp_path, step=1, state=state, tensors=tensors(1.0), keep=1)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    read = json.loads((path / "state.json").read_text(), parse_constant=refuse)
    assert [float(value) for value in read["interval"]] == [-math.inf, math.inf]
    assert math.isnan(float(read["facts"]["means"][0]))


def test_pruning_leaves_the_newest_sound_checkpoint(tmp_path) -> None:
    for step, sound in ((1, True), (2, True), (3, False), (4, False), (5, False)):
        checkpoint.save(tmp_path, step=step, state={}, tensors=tensors(1.0), keep=2, sound=sound)
    assert [path.name for path in checkpoint.paths(tmp_path)] == [
        "step-000000005",
        "step-000000004",
        "step-000000002",
    ]
    assert checkpoint.set_diverged_aside(tmp_path) == 2
    assert [path.name for path in checkpoint.paths(tmp_path)] == ["step-000000002"]
    assert (tmp_path / "latest").read_text() == "step-000000002\n"
    assert sorted(path.name for path in tmp_path.glob("*.diverged")) == [
        "step-000000004.diverged",
        "step-000000005.diverged",
    ]
    checkpoint.save(tmp_path, step=6, state={}, tensors=tensors(1.0), keep=1, sound=True)
    assert [path.name for path in checkpoint.paths(tmp_path)] == ["step-000000006"]


@pytest.mark.parametrize(
    ("losses", "sound"),
    [((1.0, 0.5), True), ((0.1, 0.1, 50.0), False), ((0.1, 0.9), True), ((-1.0, 3.0), True)],
)
def test_a_loss_far_above_its_least_is_not_sound(losses: tuple[float, ...], sound: bool) -> None:
    counters = Counters()
    for loss in losses:
        counters.record_update(loss)
    assert counters.sound == sound
    counters.record_skip()
    assert not counters.sound
