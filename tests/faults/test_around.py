"""What happens around the process: signals, closed outputs, full disks, dead or hanging readers."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sfumato.storage import checkpoint
from sfumato.training import denoising_error, saving, trainer
from tests.faults.conftest import Case
from tests.faults.injector import Child, counters, has_step, leftovers, newest, status
from tests.helpers.runs import fingerprint, images

LONG = (
    "budget.steps=100000", "checkpoint.every_steps=99999", "validation.every_steps=99999",
    "preview.every_steps=99999",
)  # fmt: skip
# images are decoded when they are used, by other processes
READERS = ("data.cache=off", "data.memory_gib=0", "data.workers=2")


def started(case: Case, *arguments: str, step: int = 3, **options: Any) -> tuple[Path, Child]:
    run = case.lab.new("run")
    child = case.lab.start("train", case.recipe, "--run", run, *arguments, **options)
    child.until(lambda: has_step(run, step))
    return run, child


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_saves_and_stops(pixel: Case, name: str) -> None:
    run, child = started(pixel, *LONG)
    number = getattr(signal, name)
    child.send(number)
    assert child.wait(5) == 128 + number, child.said()
    assert newest(run).name > "step-000000000"
    assert status(run) == "interrupted"
    assert f"{name}: saved at step" in child.said()


def test_a_signal_that_is_sent_twice_at_once_is_one(pixel: Case) -> None:
    """As `timeout` does, and launchers that forward what the group received."""
    run, child = started(pixel, *LONG)
    child.send(signal.SIGTERM)
    child.send(signal.SIGTERM)
    assert child.wait(5) == 143
    assert status(run) == "interrupted"
    assert newest(run).name > "step-000000000"


def test_sigusr1_saves_and_goes_on(pixel: Case) -> None:
    run, child = started(pixel, *LONG)
    child.send(signal.SIGUSR1)
    child.until(lambda: newest(run).name > "step-000000000")
    assert child.poll() is None, child.said()
    saved = counters(run)["step"]
    child.until(lambda: has_step(run, saved + 5))
    child.send(signal.SIGTERM)
    assert child.wait(5) == 143
    assert "SIGUSR1: step" in child.said()


def test_sigusr1_before_there_is_anything_to_save_is_ignored(
    pixel: Case, own_cache: Callable[[], Path], tmp_path: Path
) -> None:
    from sfumato.data import pixel_store

    run, mark = pixel.lab.new("early"), tmp_path / "mark"
    child = pixel.lab.start(
        "train", pixel.recipe, "--run", run, patch=slow(pixel_store, "decode", 0.02, mark)
    )
    child.until(mark.exists)
    child.send(signal.SIGUSR1)
    assert child.wait() == 0, child.said()
    assert fingerprint(run) == pixel.end


def slow(
    module: Any,
    name: str,
    seconds: float,
    mark: Path,
    ready: Callable[[], bool] = lambda: True,
) -> Callable[[], None]:
    """Return a patch that makes each call of a function take longer, once it is `ready`; the first
    makes a file.
    """

    def patch() -> None:
        real = getattr(module, name)

        def slowed(*arguments: Any, **options: Any) -> Any:
            if ready():
                mark.touch()
                time.sleep(seconds)
            return real(*arguments, **options)

        setattr(module, name, slowed)

    return patch


def trainer_is_at(step: int) -> bool:
    """Return whether a trainer of this process has reached a step."""
    return any(
        isinstance(thing, trainer.Trainer) and thing.state.counters.step == step
        for thing in gc.get_objects()
    )


def during(
    case: Case, mark: Path, *arguments: str, patch: Callable[[], None]
) -> tuple[Path, Child]:
    run = case.lab.new("run")
    child = case.lab.start("train", case.recipe, "--run", run, *arguments, patch=patch)
    child.until(mark.exists)
    child.send(signal.SIGTERM)
    assert child.wait(60) == 143, child.said()
    assert "Traceback" not in child.said()
    return run, child


def test_a_signal_in_a_validation_is_obeyed_before_its_end(pixel: Case, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    patch = slow(denoising_error.Triples, "part", 0.3, mark, lambda: trainer_is_at(3))
    run, child = during(
        pixel, mark, "validation.every_steps=3", "validation.samples=4000", patch=patch
    )
    assert counters(run)["step"] == 3
    assert "held-out noise error" not in child.said()


def test_a_signal_in_a_preview_is_obeyed_before_its_end(pixel: Case, tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    def patch() -> None:
        from sfumato.process import signals
        from sfumato.training import hooks

        def polled() -> None:
            mark.touch()
            time.sleep(0.2)
            signals.poll()

        hooks.poll = polled

    run, _ = during(pixel, mark, "sampling.steps=200", patch=patch)
    assert counters(run)["step"] == 0


@pytest.mark.parametrize("what", ["reading", "encoding"])
def test_a_signal_while_preparing_stops_and_keeps_what_is_done(
    latent: Case, own_cache: Callable[[], Path], tmp_path: Path, what: str
) -> None:
    from sfumato.data import pixel_store
    from sfumato.training import latent_cache

    mark = tmp_path / "mark"
    slowed = {
        "reading": slow(pixel_store, "decode", 0.2, mark),
        "encoding": slow(latent_cache, "_moments", 0.3, mark),
    }[what]
    run, child = during(latent, mark, patch=slowed)
    assert "stopped before training; what was read and encoded so far is kept" in child.said()
    assert leftovers(own_cache()) == []
    if what == "reading":
        assert not run.exists()
    else:
        latent.ends_equal(run)


def test_a_pipe_that_nobody_reads_any_more_changes_nothing(pixel: Case) -> None:
    reading, writing = os.pipe()
    run = pixel.lab.new("pipe")
    child = pixel.lab.start(
        "train", pixel.recipe, "--run", run, stderr=writing, patch=lambda: os.close(reading)
    )
    os.close(writing)
    child.until(lambda: has_step(run, 2))
    os.close(reading)
    assert child.wait() == 0
    assert fingerprint(run) == pixel.end


def test_a_terminal_that_is_closed_changes_nothing(pixel: Case) -> None:
    """Under nohup, which ignores SIGHUP."""
    master, slave = pty.openpty()

    def detach() -> None:
        os.close(master)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    run = pixel.lab.new("terminal")
    child = pixel.lab.start("train", pixel.recipe, "--run", run, stderr=slave, patch=detach)
    os.close(slave)
    child.until(lambda: has_step(run, 2))
    os.close(master)
    assert child.wait() == 0
    assert fingerprint(run) == pixel.end


def readers_of(child: Child) -> list[int]:
    path = Path(f"/proc/{child.pid}/task/{child.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def test_a_reader_that_is_killed_is_started_again(pixel: Case) -> None:
    run, child = started(pixel, *READERS, "budget.steps=60", step=20)
    os.kill(readers_of(child)[0], signal.SIGKILL)
    assert child.wait() == 0, child.said()
    assert "all of them are started again at step" in child.said()
    alone = pixel.lab.new("alone")
    code, said = pixel.lab.call("train", pixel.recipe, "--run", alone, "budget.steps=60")
    assert code == 0, said
    assert fingerprint(run) == fingerprint(alone)


def test_readers_that_die_again_and_again_end_the_run_saved(pixel: Case) -> None:
    run, child = started(pixel, *READERS, *LONG, step=5)
    while child.poll() is None:
        with contextlib.suppress(OSError, IndexError):
            os.kill(readers_of(child)[0], signal.SIGKILL)
        time.sleep(0.05)
    assert child.code == 2, child.said()
    assert "lower data.workers" in child.said()
    assert counters(run)["step"] >= 5


def test_a_killed_run_is_resumed_at_once_though_its_readers_live(pixel: Case) -> None:
    run, child = started(pixel, *READERS, *LONG)
    child.kill()
    code, said = pixel.lab.call("resume", run, "budget.steps=6")
    assert code == 0, said


def hanging(after: int) -> Callable[[], None]:
    """Return a patch with which reading an image never returns, as on a network disk that is gone."""

    def patch() -> None:
        from sfumato.data import loader

        real = loader._Batches.__getitem__

        def get(self: Any, step: int) -> Any:
            if step >= after:
                time.sleep(1000)
            return real(self, step)

        loader._Batches.__getitem__ = get  # type: ignore[method-assign]

    return patch


@pytest.mark.parametrize("readers", [(), READERS])
def test_a_read_that_hangs_ends_with_stacks_and_what_was_trained(
    pixel: Case, readers: tuple[str, ...]
) -> None:
    run = pixel.lab.new("hang")
    child = pixel.lab.start(
        "train", pixel.recipe, "--run", run, *LONG, *readers, "stall_minutes=0.05",
        patch=hanging(9),
    )  # fmt: skip
    assert child.wait(60) == 75, child.said()
    assert "nothing has moved for" in child.said()
    stacks = (run / "stacks.txt").read_text()
    assert "trainer.py" in stacks
    assert status(run) == "stalled"
    assert counters(run)["step"] == 9


def test_sigterm_while_readers_hang_is_obeyed(pixel: Case) -> None:
    run = pixel.lab.new("hang")
    child = pixel.lab.start("train", pixel.recipe, "--run", run, *LONG, *READERS, patch=hanging(9))
    child.until(lambda: has_step(run, 9))
    time.sleep(0.5)
    child.send(signal.SIGTERM)
    assert child.wait(10) == 143, child.said()
    assert counters(run)["step"] == 9


def quick_waits() -> None:
    trainer.LAST_WAITS_S = trainer.STOP_WAITS_S = (0.1, 0.2, 0.3)
    saving.RETRY_S = 0.1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 40 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("a disk cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path, leave: int = 0) -> Path:
    ballast = place / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        left = shutil.disk_usage(place).free - leave
        while left > 0:
            left -= file.write(bytes(min(left, 1 << 20)))
    return ballast


@pytest.mark.parametrize("leave", [0, 40_000])
def test_a_disk_that_is_full_at_the_end_is_not_called_finished(
    pixel: Case, small_disk: Path, leave: int
) -> None:
    run, filled = small_disk / "run", small_disk / "ballast"

    def patch() -> None:
        quick_waits()
        real = trainer.Trainer.train_step

        def step(self: Any, batch: Any) -> Any:
            if self.state.counters.step == 10:
                self.saver.wait()
                fill(small_disk, leave)
            return real(self, batch)

        trainer.Trainer.train_step = step  # type: ignore[method-assign]

    code, said = pixel.lab.call("train", pixel.recipe, "--run", run, patch=patch)
    assert code == 74, said
    assert "could not be saved, and is lost; the newest checkpoint is step-000000008" in said
    assert leave == 0 or status(run) == "unsaved"
    filled.unlink()
    pixel.ends_equal(run)


def test_a_disk_that_was_full_for_a_while_loses_nothing(pixel: Case, small_disk: Path) -> None:
    run = small_disk / "run"

    def patch() -> None:
        quick_waits()
        real = trainer.Trainer.train_step

        def step(self: Any, batch: Any) -> Any:
            if self.state.counters.step == 5:
                self.saver.wait()
                fill(small_disk)
            if self.state.counters.step == 14:
                (small_disk / "ballast").unlink()
            return real(self, batch)

        trainer.Trainer.train_step = step  # type: ignore[method-assign]

    code, said = pixel.lab.call("train", pixel.recipe, "--run", run, patch=patch)
    assert code == 0, said
    assert "could not be written" in said
    kept = {name: value for name, value in fingerprint(run).items() if name in ("model", "ema")}
    assert kept == {name: pixel.end[name] for name in kept}


def test_a_person_may_free_space_while_the_end_waits(pixel: Case, tmp_path: Path) -> None:
    mark = tmp_path / "freed"

    def patch() -> None:
        quick_waits()
        real = checkpoint.save_file

        def full(*arguments: Any, **options: Any) -> Any:
            if "step-000000016" in str(arguments[1]) and not mark.exists():
                mark.touch()
                raise OSError(28, "No space left on device")
            return real(*arguments, **options)

        checkpoint.save_file = full

    run = pixel.lab.new("freed")
    code, said = pixel.lab.call("train", pixel.recipe, "--run", run, patch=patch)
    assert code == 0, said
    assert "trying again in 0.1 s" in said
    assert fingerprint(run) == pixel.end


def limited(size: int) -> Callable[[], None]:
    """Return a patch with a limit on the size of files, as a quota: no free space shows it."""

    def patch() -> None:
        quick_waits()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return patch


def test_a_quota_while_resuming_harms_nothing(pixel: Case) -> None:
    run = pixel.killed()
    before = (run / "config.yaml").read_bytes()
    code, _ = pixel.lab.call("resume", run, patch=limited(1024))
    assert code != 0
    assert (run / "config.yaml").read_bytes() == before
    pixel.ends_equal(run)


def test_a_quota_from_the_start_is_an_error_with_a_hint(pixel: Case) -> None:
    run = pixel.lab.new("quota")
    code, said = pixel.lab.call("train", pixel.recipe, "--run", run, patch=limited(100_000))
    assert code == 2, said
    assert "could not be written" in said


def test_sigterm_on_a_full_disk_says_that_it_is_not_saved(pixel: Case, small_disk: Path) -> None:
    run = small_disk / "run"
    child = pixel.lab.start("train", pixel.recipe, "--run", run, *LONG, patch=quick_waits)
    child.until(lambda: has_step(run, 5))
    fill(small_disk)
    child.send(signal.SIGTERM)
    assert child.wait(10) == 74, child.said()
    assert "the newest checkpoint is step-000000000" in child.said()


def test_too_little_memory_halves_the_micro_batch_and_not_the_result(pixel: Case) -> None:
    same = ("network.dropout=0", "conditioner.category.dropout=0", "micro_batch=8")

    def patch() -> None:
        real = trainer.Trainer._backward

        def backward(self: Any, batch: Any, dtype: Any) -> Any:
            if self.state.counters.step >= 5 and self._micro_batch > 2:
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
            return real(self, batch, dtype)

        trainer.Trainer._backward = backward  # type: ignore[method-assign]

    run, whole = pixel.lab.new("memory"), pixel.lab.new("whole")
    code, said = pixel.lab.call("train", pixel.recipe, "--run", run, *same, patch=patch)
    assert code == 0, said
    assert "from here on they have 4; the batch, and so the result, is the same" in said
    assert counters(run)["micro_batch"] == 2
    code, said = pixel.lab.call("train", pixel.recipe, "--run", whole, *same)
    assert code == 0, said
    assert losses(run) == pytest.approx(losses(whole), rel=1e-4)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_one_command_begins_goes_on_and_is_done(pixel: Case) -> None:
    run = pixel.lab.new("again")
    command = ("train", pixel.recipe, "--run", run, "--resume")
    child = pixel.lab.start(*command)
    child.until(lambda: has_step(run, 9))
    child.kill()
    code, said = pixel.lab.call(*command)
    assert code == 0, said
    assert fingerprint(run) == pixel.end
    code, said = pixel.lab.call(*command)
    assert code == 0
    assert "finished already" in said


def test_a_run_goes_on_from_an_earlier_checkpoint(pixel: Case) -> None:
    run = pixel.lab.new("earlier")
    shutil.copytree(pixel.lab.place / "alone", run)
    code, said = pixel.lab.call("resume", run, "--from", "3")
    assert code == 2
    assert "step 3 has no checkpoint" in said
    assert "there are 12, 16" in said
    code, said = pixel.lab.call("resume", run, "--from", "12")
    assert code == 0, said
    assert (run / "checkpoints" / "step-000000016.replaced").is_dir()
    assert fingerprint(run) == pixel.end


def test_added_images_are_trained_on_from_a_new_epoch(pixel: Case, tmp_path: Path) -> None:
    folder = images(tmp_path / "images", size=8)
    source = f"data.source.path={folder}"
    run, other = pixel.lab.new("added"), pixel.lab.new("same")
    code, said = pixel.lab.call("train", pixel.recipe, "--run", run, source, "budget.steps=6")
    assert code == 0, said
    shutil.copytree(run, other)
    more = images(tmp_path / "more", count=50, size=8)
    for file in more.rglob("*.png"):
        if not (folder / file.relative_to(more)).exists():
            shutil.copy(file, folder / file.relative_to(more))
    results = []
    for directory in (run, other):
        code, said = pixel.lab.call(
            "resume", directory, "--accept-data-change", "budget.steps=60",
            "checkpoint.every_steps=7",
        )  # fmt: skip
        assert code == 0, said
        assert "10 image(s) new" in said
        assert "a new epoch begins" in said
        code, said = pixel.lab.call("resume", directory, "budget.steps=64")
        assert code == 0, said
        results.append(fingerprint(directory))
    state = json.loads((newest(run) / "state.json").read_text())
    assert state["plan_begins"] == 6
    assert results[0] == results[1]


@pytest.mark.parametrize("readers", [(), ("data.cache=off", "data.memory_gib=0"), READERS])
def test_pipes_in_the_place_of_images_are_unreadable_and_do_not_hang(
    pixel: Case, tmp_path: Path, readers: tuple[str, ...]
) -> None:
    folder = images(tmp_path / "images", size=8)
    run = pixel.lab.new("pipes")
    child = pixel.lab.start(
        "train", pixel.recipe, "--run", run, f"data.source.path={folder}", *readers,
        "budget.steps=80",
    )  # fmt: skip
    child.until(lambda: has_step(run, 5))
    for file in folder.rglob("*.png"):
        file.unlink()
        os.mkfifo(file)
    code = child.wait(60)
    if readers:
        assert code == 2, child.said()
        assert "can no longer be read" in child.said()
        assert counters(run)["step"] >= 5  # saved
    else:
        assert code == 0, child.said()
