"""A copy of a run in a store, from which an empty machine goes on."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from sfumato import runs
from sfumato.errors import ConfigError, RunError
from sfumato.training import Budget, CheckpointConfig, mirror
from sfumato.training.mirror import Mirror, MirrorError
from sfumato.training.trainer import Trainer
from tests.helpers.runs import fingerprint, images, tiny_run

URL = "memory://mirror/run"


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(mirror, "PAUSE_S", 0.0)
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


class Flaky:
    """A store each of whose calls fails at first, and then works."""

    def __init__(self, system: Any, failures: int = 1, of: str = "") -> None:
        self.system, self.failures, self.failed = system, failures, Counter[str]()
        self.of = of
        self.order: list[tuple[str, str]] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.system, name)

        def call(*args: Any, **options: Any) -> Any:
            key = f"{name} {args[0] if args else ''}"
            self.failed[key] += 1
            if self.failed[key] <= self.failures and self.of in name:
                raise ConnectionError("reset by peer")
            self.order.append((name, str(args[name == "put_file"]) if args else ""))
            return real(*args, **options)

        return call


def stopping_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let training fail after a step."""
    real = Trainer.train_step

    def train_step(trainer: Trainer, batch: Any) -> Any:
        if trainer.state.counters.step == step:
            raise RuntimeError("the machine is gone")
        return real(trainer, batch)

    monkeypatch.setattr(Trainer, "train_step", train_step)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("images"))


def mirrored(folder: Path) -> Any:
    return tiny_run(
        folder,
        budget=Budget(steps=14),
        checkpoint=CheckpointConfig(every_steps=4, keep=2, mirror=URL),
    )


def test_an_empty_machine_goes_on_from_the_mirror_though_every_call_fails_once(
    folder: Path, tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = runs.train(
        tiny_run(folder, checkpoint=CheckpointConfig(every_steps=4, keep=2)), run=tmp_path / "whole"
    )
    flaky = Flaky(store)
    monkeypatch.setattr(mirror, "filesystem", lambda url: (flaky, "/mirror/run"))
    with monkeypatch.context() as patch:
        stopping_at(patch, 10)
        with pytest.raises(RuntimeError, match="gone"):
            runs.train(mirrored(folder), run=tmp_path / "there")
    shutil.rmtree(tmp_path / "there")
    here = runs.resume(tmp_path / "here", mirror=URL)
    ours, theirs = fingerprint(here), fingerprint(whole)
    assert ours == theirs
    steps = {name.split("/")[4] for name in store.store if "/checkpoints/step-" in name}
    assert steps == {path.name for path in (here / "checkpoints").glob("step-*")}
    assert store.exists("/mirror/run/report.html")
    assert min(flaky.failed.values()) >= 2


def test_a_manifest_is_written_last_and_older_checkpoints_are_removed_afterwards(
    folder: Path, tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flaky = Flaky(store, failures=0)
    monkeypatch.setattr(mirror, "filesystem", lambda url: (flaky, "/mirror/run"))
    runs.train(mirrored(folder), run=tmp_path / "run")
    for step in ("step-000000004", "step-000000012"):
        written = [
            name
            for call, name in flaky.order
            if call == "put_file" and f"checkpoints/{step}" in name
        ]
        assert written[-1].endswith("manifest.json")
        assert len(written) == len(set(written)) == 5
    removed = [
        number
        for number, (call, name) in enumerate(flaky.order)
        if call == "rm" and "step-000000000" in name
    ]
    manifest = flaky.order.index(
        ("rm_file", "/mirror/run/checkpoints/step-000000000/manifest.json")
    )
    later = flaky.order.index(("put_file", "/mirror/run/checkpoints/step-000000008/manifest.json"))
    assert later < manifest < removed[0]


def test_a_mirror_that_cannot_be_reached_is_said_and_ends_nothing(
    folder: Path, tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    flaky = Flaky(store, failures=10**9, of="put_file")
    monkeypatch.setattr(mirror, "filesystem", lambda url: (flaky, "/mirror/run"))
    run = runs.train(mirrored(folder), run=tmp_path / "run")
    assert fingerprint(run)["step"] == "step-000000014"
    said = capsys.readouterr().err
    assert said.count("the mirror is not up to date") >= 2
    assert "reset by peer" in said


def test_a_run_is_never_replaced_by_a_new_one_nor_copied_where_a_stranger_says(
    folder: Path, tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.train(mirrored(folder), run=tmp_path / "run")
    before = dict(store.store)
    with pytest.raises(RunError, match="a new one would replace"):
        runs.train(mirrored(folder), run=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert store.store == before
    (tmp_path / "run" / "local.json").unlink()  # as if it came from elsewhere
    with pytest.raises(ConfigError, match="not made on this machine"):
        runs.resume(tmp_path / "run", overrides=["budget.steps=16"])
    assert store.store == before
    runs.resume(tmp_path / "run", overrides=["budget.steps=16", "checkpoint.mirror=memory://own"])
    assert store.store.keys() > before.keys()


def test_a_checkpoint_that_is_not_whole_is_passed_over(
    folder: Path, tmp_path: Path, store: Any
) -> None:
    run = runs.train(mirrored(folder), run=tmp_path / "run")
    newest, before = sorted((run / "checkpoints").glob("step-*"))[::-1]
    with store.open(f"/mirror/run/checkpoints/{newest.name}/ema.safetensors", "wb") as file:
        file.write(b"cut")
    assert Mirror(URL, tmp_path / "here").pull().name == before.name
    store.rm_file(f"/mirror/run/checkpoints/{before.name}/manifest.json")
    with pytest.raises(MirrorError, match="no whole checkpoint"):
        Mirror(URL, tmp_path / "there").pull()
    assert not (tmp_path / "there" / "config.yaml").exists()


def test_what_is_there_is_never_replaced_and_no_name_leads_elsewhere(
    folder: Path, tmp_path: Path, store: Any
) -> None:
    run = runs.train(mirrored(folder), run=tmp_path / "run")
    with pytest.raises(RunError, match="already a run here"):
        runs.resume(run, mirror=URL)
    with pytest.raises(MirrorError, match="holds no run"):
        runs.resume(tmp_path / "new", mirror="memory://mirror/nothing")
    store.pipe_file("/mirror/run/../../outside", b"x")
    store.store["/mirror/run/../outside"] = store.store.pop(
        next(name for name in store.store if name.endswith("outside"))
    )
    with pytest.raises(MirrorError, match="not below"):
        Mirror(URL, tmp_path / "other").pull()
    assert not (tmp_path / "outside").exists()
