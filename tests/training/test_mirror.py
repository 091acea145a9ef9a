"""A copy of a run in a store, from which an empty machine goes on."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from sfumato import runs
from sfumato.errors import ConfigError, RunError
from sfumato.training import Budget, CheckpointConfig, mirror
from sfumato.training.mirror import BackgroundMirror, Mirror, MirrorError
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


def copies_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each checkpoint be copied before the next is saved."""
    begin = BackgroundMirror.begin

    def begin_and_wait(background: BackgroundMirror) -> None:
        begin(background)
        background.wait()

    monkeypatch.setattr(BackgroundMirror, "begin", begin_and_wait)


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
    copies_at_once(monkeypatch)
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
    copies_at_once(monkeypatch)
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


class Waiting:
    """A store that takes no file before a gate opens."""

    def __init__(self, system: Any, gate: threading.Event) -> None:
        self.system, self.gate, self.opened = system, gate, list[bool]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.system, name)

    def put_file(self, *args: Any, **options: Any) -> Any:
        self.opened.append(self.gate.wait(60))
        return self.system.put_file(*args, **options)


def test_training_does_not_wait_for_a_slow_store(
    folder: Path, tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, real = threading.Event(), Trainer.train_step
    waiting = Waiting(store, gate)
    monkeypatch.setattr(mirror, "filesystem", lambda url: (waiting, "/mirror/run"))

    def train_step(trainer: Trainer, batch: Any) -> Any:
        if trainer.state.counters.step == 13:  # after three checkpoints
            assert not waiting.opened
            gate.set()
        return real(trainer, batch)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    run = runs.train(mirrored(folder), run=tmp_path / "run")
    assert all(waiting.opened)
    kept = {path.name for path in (run / "checkpoints").glob("step-*")}
    assert {name.split("/")[4] for name in store.store if "/checkpoints/step-" in name} == kept
    assert Mirror(URL, tmp_path / "here").pull().name == "step-000000014"


def test_a_checkpoint_that_is_there_is_not_sent_again_and_a_changed_one_is(
    folder: Path, tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.train(mirrored(folder), run=tmp_path / "run")
    flaky = Flaky(store, failures=0)
    monkeypatch.setattr(mirror, "filesystem", lambda url: (flaky, "/mirror/run"))
    Mirror(URL, run).push()
    assert not [
        name for call, name in flaky.order if call == "put_file" and "checkpoints/step-" in name
    ]
    again = Mirror(URL, run)
    again.push()
    manifest = run / "checkpoints" / "step-000000014" / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")  # as one that was trained again
    flaky.order.clear()
    again.push()
    calls = [(call, name.rpartition("/")[2]) for call, name in flaky.order if "14/" in name]
    changes = [call for call in calls if call[0] in ("put_file", "rm_file")]
    assert changes[0] == ("rm_file", "manifest.json")
    assert changes[-1] == ("put_file", "manifest.json")
    assert store.cat_file(f"/mirror/run/checkpoints/{manifest.parent.name}/manifest.json") == (
        manifest.read_bytes()
    )


def test_a_checkpoint_that_is_removed_while_it_is_sent_gets_no_manifest(
    folder: Path, tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.train(mirrored(folder), run=tmp_path / "run")
    system = Removing(store, run / "checkpoints" / "step-000000012" / "ema.safetensors")
    monkeypatch.setattr(mirror, "filesystem", lambda url: (system, "/other/run"))
    Mirror(URL, run).push()
    there = [name for name in store.store if name.startswith("/other/run/checkpoints/step-")]
    assert not [name for name in there if "12/" in name and name.endswith("manifest.json")]
    assert [name for name in there if "14/" in name and name.endswith("manifest.json")]


class Removing:
    """A store that loses a local file when anything is sent."""

    def __init__(self, system: Any, path: Path) -> None:
        self.system, self.path = system, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self.system, name)

    def put_file(self, *args: Any, **options: Any) -> Any:
        if self.path.parent.name in args[0]:
            self.path.unlink(missing_ok=True)
        return self.system.put_file(*args, **options)


def test_an_error_that_nobody_foresaw_ends_no_training_and_no_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def push(one: Mirror) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Mirror, "push", push)
    background = BackgroundMirror(Mirror(URL, tmp_path))
    for _ in range(2):
        background.begin()
        waiting = threading.Thread(target=background.wait, daemon=True)
        waiting.start()
        waiting.join(30)
        assert not waiting.is_alive()
        assert (
            "the run itself is: RuntimeError: can't start new thread" in background.take_warning()
        )
