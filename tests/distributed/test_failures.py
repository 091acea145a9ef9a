"""What happens when one of two processes is killed, raises, hangs, or is asked to stop: no process is left
waiting, and the run goes on from its newest checkpoint as if nothing had happened.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sfumato.distributed import current
from tests.distributed.conftest import Runs, difference, losses
from tests.faults.injector import counters, has_step, leftovers, newest, status
from tests.helpers.runs import fingerprint

TWO = ("--procs", "2")
LONG = ("budget.steps=100000", "log.every_steps=1")


def children(pid: int) -> list[int]:
    """Return the processes that a process has forked, oldest first."""
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def at_step(step: int, action: Callable[[], Any], *, rank: int = 1) -> Callable[[], None]:
    """Return a patch that lets one process do something when it begins a step."""

    def patch() -> None:
        from sfumato.training.trainer import Trainer

        real = Trainer._backward

        def backward(trainer: Trainer, *args: Any) -> Any:
            if trainer.state.counters.step == step and current().rank == rank:
                action()
            return real(trainer, *args)

        Trainer._backward = backward

    return patch


def fail() -> None:
    raise RuntimeError("a cosmic ray")


def goes_on_as_if_nothing_had_happened(runs: Runs, run: Path) -> None:
    runs.resume(run, *TWO)
    assert fingerprint(run) == fingerprint(two(runs))
    assert not leftovers(run)


def two(runs: Runs) -> Path:
    """Return the run of two processes to which nothing happened."""
    if "two" not in runs._alone:
        runs._alone["two"] = runs.train("pixel", *TWO)
    return runs._alone["two"]


@pytest.mark.parametrize(
    ("what", "rank", "code", "said"),
    [
        pytest.param(
            "killed", 0, 137, "process 0 of 2 was ended by SIGKILL", marks=pytest.mark.slow
        ),
        ("killed", 1, 137, "process 1 of 2 was ended by SIGKILL"),
        ("raises", 1, 1, "a cosmic ray"),
        ("exits", 0, 7, ""),
    ],
)
def test_a_process_that_fails_ends_the_others(
    runs: Runs, what: str, rank: int, code: int, said: str
) -> None:
    action = {
        "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "raises": fail,
        "exits": lambda: os._exit(7),
    }[what]
    run = runs.lab.new(what)
    child = runs.lab.start(
        "train", runs.recipe("pixel"), "--run", run, *TWO, patch=at_step(8, action, rank=rank)
    )
    assert child.wait() == code, child.said()
    assert said in child.said()
    if what == "raises":
        assert "in fail" in child.said()  # its traceback
    assert newest(run).name == "step-000000005"
    goes_on_as_if_nothing_had_happened(runs, run)


def test_a_process_that_hangs_ends_all_with_their_stacks(runs: Runs) -> None:
    run = runs.lab.new("hang")
    child = runs.lab.start(
        "train", runs.recipe("pixel"), "--run", run, *TWO, "stall_minutes=0.05",
        patch=at_step(8, lambda: time.sleep(1000)),
    )  # fmt: skip
    assert child.wait() == 75, child.said()
    assert "nothing has moved for" in child.said()
    goes_on_as_if_nothing_had_happened(runs, run)


def test_a_loss_that_is_not_finite_in_one_process_is_skipped_by_both(runs: Runs) -> None:
    def patch() -> None:
        import torch

        from sfumato.training.tasks.diffusion import Diffusion

        real = Diffusion.loss

        def loss(task: Diffusion, model: Any, batch: Any, *args: Any, **options: Any) -> Any:
            losses = real(task, model, batch, *args, **options)
            if batch.first == 8 * 6 and current().rank == 1:
                return losses._replace(per_sample=losses.per_sample * torch.nan)
            return losses

        Diffusion.loss = loss

    run = runs.train("pixel", *TWO, patch=patch)
    found = counters(run)
    assert (found["step"], found["updates"], found["skipped"]) == (20, 19, 1)
    assert losses(run)[7] is None


@pytest.mark.parametrize(
    ("to", "engine"),
    [
        ("all", "replicate"),
        ("first", "replicate"),
        ("second", "replicate"),
        pytest.param("second", "shard", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_any_process_stops_all_at_the_same_step(
    runs: Runs, to: str, engine: str
) -> None:
    run = runs.lab.new("signal")
    child = runs.lab.start(
        "train", runs.recipe("pixel"), "--run", run, *TWO, *LONG, f"distributed={engine}"
    )
    child.until(lambda: has_step(run, 6))
    if to == "all":
        child.send(signal.SIGTERM)
    else:
        os.kill(children(child.pid)[to == "second"], signal.SIGTERM)
    assert child.wait(60) == 143, child.said()
    assert "Traceback" not in child.said()
    assert status(run) == "interrupted"
    assert counters(run)["step"] >= 6
    assert not leftovers(run)


def slowed(module: str, name: str, mark: Path, seconds: float) -> Callable[[], None]:
    """Return a patch that makes a function slow, and tells that it was called."""

    def patch() -> None:
        import importlib

        owner = importlib.import_module(module)
        real = getattr(owner, name)

        def slow(*args: Any, **options: Any) -> Any:
            mark.touch()
            time.sleep(seconds)
            return real(*args, **options)

        setattr(owner, name, slow)

    return patch


@pytest.mark.parametrize("to", ["all", "second"])
@pytest.mark.parametrize(
    ("recipe", "module", "name"),
    [
        ("pixel", "sfumato.training.denoising_error", "_rows"),
        ("pixel", "sfumato.training.hooks", "poll"),
        ("latent", "sfumato.training.latent_cache", "_moments"),
    ],
)
def test_a_signal_in_a_validation_a_preview_or_an_encoding_is_obeyed(
    runs: Runs, recipe: str, module: str, name: str, to: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    run, mark = runs.lab.new("signal"), tmp_path / "mark"
    child = runs.lab.start(
        "train", runs.recipe(recipe), "--run", run, *TWO, *LONG,
        patch=slowed(module, name, mark, 0.2),
    )  # fmt: skip
    child.until(mark.exists)
    target = child.pid if to == "all" else children(child.pid)[1]
    os.kill(target, signal.SIGTERM)
    assert child.wait(60) == 143, child.said()
    assert "Traceback" not in child.said()


def test_sigusr1_saves_and_goes_on(runs: Runs) -> None:
    run = runs.lab.new("save")
    child = runs.lab.start(
        "train", runs.recipe("pixel"), "--run", run, *TWO, *LONG, "checkpoint.every_steps=90000"
    )
    child.until(lambda: has_step(run, 3))
    child.send(signal.SIGUSR1)
    child.until(lambda: newest(run).name > "step-000000000")
    saved = counters(run)["step"]
    child.until(lambda: has_step(run, saved + 3))
    child.send(signal.SIGINT)
    assert child.wait(60) == 130, child.said()


def test_learning_rates_are_equal_though_one_process_is_slow(runs: Runs, tmp_path: Path) -> None:
    def patch() -> None:
        from sfumato.training.tasks.protocol import OptimizedPart

        real = OptimizedPart.step

        def step(part: OptimizedPart, updates: int, progress: float) -> None:
            if current().rank == 1:
                time.sleep(0.03)
            real(part, updates, progress)
            with (tmp_path / f"{current().rank}.txt").open("a") as file:
                file.write(f"{part.rate!r} {progress!r}\n")

        OptimizedPart.step = step

    run = runs.train("pixel", *TWO, "budget={minutes: 0.03}", patch=patch)
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert first == second
    assert len(set(first.splitlines())) == counters(run)["updates"] > 3


def test_only_the_first_process_writes_into_the_run(runs: Runs, tmp_path: Path) -> None:
    def patch() -> None:
        writing = os.O_WRONLY | os.O_RDWR

        def hook(event: str, args: tuple[Any, ...]) -> None:
            if current().rank == 0 or not args:
                return
            changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
            if changes or (event == "open" and isinstance(args[2], int) and args[2] & writing):
                place = str(args[0])
                if "/latent-" in place:
                    with open(os.devnull):
                        os.write(handle, f"{event} {place}\n".encode())

        handle = os.open(tmp_path / "written", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        sys.addaudithook(hook)

    run = runs.train("latent", *TWO, patch=patch)
    assert "/latent-" in str(run)
    assert not (tmp_path / "written").read_text()


def listening(pids: list[int]) -> set[str]:
    """Return the addresses on which processes listen, as /proc/net says them."""
    inodes = set()
    for pid in pids:
        for handle in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = os.readlink(handle)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            parts = line.split()
            if parts[3] == "0A" and parts[9] in inodes:
                found.add(parts[1].split(":")[0])
    return found


def test_processes_of_one_machine_listen_on_loopback_only(runs: Runs) -> None:
    run = runs.lab.new("sockets")
    child = runs.lab.start("train", runs.recipe("pixel"), "--run", run, *TWO, *LONG)
    child.until(lambda: has_step(run, 3))
    found = listening([child.pid, *children(child.pid)])
    child.send(signal.SIGTERM)
    child.wait(60)
    assert found == {"0100007F"}  # 127.0.0.1, and nothing else


def killed_and_resumed(runs: Runs, generator: random.Random) -> Path:
    """Kill processes of a run at two moments, and resume it to its end; return the run."""
    run = runs.lab.new("killed")
    arguments: tuple[object, ...] = ("train", runs.recipe("pixel"), "--run", run, "--resume", *TWO)
    for _ in range(2):
        child = runs.lab.start(*arguments)
        limit = time.monotonic() + generator.uniform(0.1, 3.0)
        child.until(lambda limit=limit: time.monotonic() > limit)
        if child.poll() is None:
            found = children(child.pid)
            victims = [[child.pid], found[:1], found[1:], [child.pid, *found]]
            for pid in generator.choice(victims):
                os.kill(pid, signal.SIGKILL)
        child.wait()
    code, said = runs.lab.call(*arguments)
    assert code == 0, said
    return run


def test_killed_anywhere_two_processes_go_on_bit_for_bit(runs: Runs) -> None:
    run = killed_and_resumed(runs, random.Random(0))
    assert fingerprint(run) == fingerprint(two(runs))
    assert not leftovers(run)


@pytest.mark.slow
def test_killed_a_hundred_times_two_processes_lose_nothing(runs: Runs) -> None:
    generator = random.Random(1)
    for _ in range(50):  # two kills each
        run = killed_and_resumed(runs, generator)
        assert fingerprint(run) == fingerprint(two(runs))
        assert not leftovers(run)


@pytest.mark.slow
def test_torchrun_starts_a_failed_run_again(runs: Runs, tmp_path: Path) -> None:
    script = tmp_path / "work.py"
    script.write_text(
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from sfumato.training.trainer import Trainer\n"
        "real, mark = Trainer._backward, Path(sys.argv[3])\n"
        "def backward(trainer, *args):\n"
        "    if trainer.state.counters.step == 8 and os.environ['RANK'] == '1' and not mark.exists():\n"
        "        mark.touch()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(trainer, *args)\n"
        "Trainer._backward = backward\n"
        "from sfumato import runs\n"
        "runs.train(sys.argv[1], run=sys.argv[2], resumes=True)\n"
    )
    run, mark = runs.lab.new("torchrun"), tmp_path / "mark"
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=2",
            "--monitor-interval=0.2", "--nproc-per-node=2", str(script),
            str(runs.recipe("pixel")), str(run), str(mark),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CI": "1"}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert mark.exists()
    assert difference(run, two(runs)) == 0
    assert json.dumps(losses(run)) == json.dumps(losses(two(runs)))


@pytest.mark.parametrize("engine", ["replicate", pytest.param("shard", marks=pytest.mark.slow)])
def test_pictures_and_looks_that_cannot_be_written_end_nothing(runs: Runs, engine: str) -> None:
    def patch() -> None:
        from sfumato.training import looks, monitors, saving

        def full(*args: Any, **options: Any) -> None:
            raise OSError(28, "No space left on device")

        monitors.Previewer._write = full  # type: ignore[method-assign]
        looks.write_text = saving.checkpoint.save_snapshot = full  # type: ignore[attr-defined]

    run = runs.lab.new("full")
    code, said = runs.lab.call(
        "train", runs.recipe("validated"), "--run", run, *TWO, f"distributed={engine}", patch=patch
    )
    assert code == 0, said
    assert "preview at step 10 failed" in said
    assert "looks at step" in said
    assert difference(run, runs.alone("dit")) < 1e-5
