"""Commands in forked children, to which anything may happen: a start takes a fraction of a second,
since torch is imported already.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sfumato.storage import checkpoint

TIMEOUT_S = 120.0
# what a test changes in the child alone
Patch = Callable[[], Any]


def warm() -> None:
    """Import what a child needs, so that it does not import it each time."""
    import scipy.linalg  # noqa: F401
    import torch._dynamo
    import torch.utils.data

    import sfumato.cli.main
    import sfumato.evaluation
    import sfumato.runs  # noqa: F401
    from sfumato import config
    from sfumato.recipes import Run

    config.parse(Run, {"name": "warm"})
    torch.set_num_threads(1)


def memory_bytes() -> tuple[int, int]:
    """Return this process's address space and its resident memory."""
    pages = Path("/proc/self/statm").read_text().split()
    return int(pages[0]) * resource.getpagesize(), int(pages[1]) * resource.getpagesize()


class Child:
    """A command of `sfumato` in a forked process.

    Args:
        log: file that both outputs are written to.
        patch: called in the child before the command.
        stderr: descriptor of standard error instead of the log.
        session: whether it gets a session of its own, as a job of a scheduler does.
        limit_mib: address space that it may take, more than this process has.
    """

    def __init__(
        self,
        *arguments: object,
        log: Path,
        patch: Patch | None = None,
        stderr: int | None = None,
        session: bool = False,
        limit_mib: int | None = None,
    ) -> None:
        warm()
        self.log, self.code, self.added_mib = log, None, 0.0
        self._base = memory_bytes()[1]
        sys.stdout.flush(), sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            if limit_mib is not None:
                limit = memory_bytes()[0] + (limit_mib << 20)
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            _child([str(argument) for argument in arguments], log, patch, stderr, session)

    code: int | None

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while the child is running."""
        if self.code is None:
            done, status, usage = os.wait4(self.pid, os.WNOHANG)
            if done:
                self.added_mib = (1024 * usage.ru_maxrss - self._base) / 2**20
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def send(self, number: int) -> None:
        """Send a signal, unless the child has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the child and wait for its end."""
        self.send(signal.SIGKILL)
        self.wait()

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Return the exit code; a child that takes too long is killed, and the test fails."""
        end = time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                self.code = -signal.SIGKILL
                pytest.fail(f"still running after {timeout_s} s:\n{self.said()[-2000:]}")
            time.sleep(0.005)
        return code

    def said(self) -> str:
        """Return what the child has written so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def until(self, condition: Callable[[], bool], *, every_s: float = 0.002) -> None:
        """Wait until a condition holds, or the child has ended."""
        end = time.monotonic() + TIMEOUT_S
        while self.poll() is None and not condition():
            assert time.monotonic() < end, self.said()[-2000:]
            time.sleep(every_s)


def _child(
    arguments: list[str], log: Path, patch: Patch | None, stderr: int | None, session: bool
) -> None:
    """Run the command and end the process; never returns."""
    code = 70
    try:
        if session:
            os.setsid()
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle if stderr is None else stderr, 2)
        os.environ["CI"] = "1"
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.argv = ["sfumato", *arguments]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        if patch is not None:
            patch()
        from sfumato.cli.main import main

        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 71
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)


class Lab:
    """A place for runs, with a command line.

    Attributes:
        place: the folder.
    """

    def __init__(self, place: Path) -> None:
        self.place, self._number = place, 0

    def start(self, *arguments: object, **options: Any) -> Child:
        """Start a command."""
        self._number += 1
        return Child(*arguments, log=self.place / f"log-{self._number}.txt", **options)

    def call(self, *arguments: object, **options: Any) -> tuple[int, str]:
        """Run a command to its end; return its exit code and what it wrote."""
        child = self.start(*arguments, **options)
        return child.wait(), child.said()

    def new(self, name: str) -> Path:
        """Return the path of a new run."""
        self._number += 1
        return self.place / f"{name}-{self._number}"


def steps(run: Path) -> list[int]:
    """Return the steps that a run has recorded."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "train/loss" in record:
            found.append(record["step"])
    return found


def has_step(run: Path, step: int) -> bool:
    """Return whether a run has recorded a step."""
    return any(done >= step for done in steps(run))


def newest(run: Path) -> Path:
    """Return the newest checkpoint of a run."""
    return checkpoint.paths(run / "checkpoints")[0]


def counters(run: Path) -> dict[str, Any]:
    """Return the counters of a run's newest checkpoint."""
    result: dict[str, Any] = json.loads((newest(run) / "state.json").read_text())["counters"]
    return result


def status(run: Path) -> str:
    """Return the state in a run's status.json."""
    return str(json.loads((run / "status.json").read_text())["state"])


def flip(path: Path, place: float = 0.5, bit: int = 1) -> None:
    """Flip a bit of a file, at a fraction of its length."""
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= bit
    path.write_bytes(bytes(data))


def leftovers(*places: Path) -> list[str]:
    """Return the temporary files and folders below some places."""
    return [str(path) for place in places for path in place.rglob(".tmp-*")]
