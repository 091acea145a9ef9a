"""Several processes on this machine, that do the same command together."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from sfumato.distributed.world import STORE
from sfumato.errors import ConfigError, PeerError
from sfumato.platform import die_with_parent

FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
# seconds that the others have to end by themselves after one has failed, and after they were asked to
ALONE_S, ASKED_S = 10.0, 20.0
POLL_S = 0.02
SHOWN = 20_000  # characters of what the process that has failed first said


def start_processes(count: int) -> None:
    """Fork `count` processes, and return in each of them; this one waits, and ends when they do.

    They find each other through a file, and listen on the loopback device only. With `count` = 1,
    nothing is done.

    Raises:
        ConfigError: if there are already several processes, or this system cannot fork.
    """
    if count == 1:
        return
    if count < 1 or not hasattr(os, "fork"):
        raise ConfigError(
            f"{count} processes" if count < 1 else "this system cannot fork processes",
            where="--procs",
            hint="use 1 or more" if count < 1 else "train on Linux or macOS, on Windows inside WSL",
        )
    if "WORLD_SIZE" in os.environ:
        raise ConfigError(
            "this is already one of several processes: WORLD_SIZE is set",
            where="--procs",
            hint="torchrun and --procs both start processes: use one of them",
        )
    folder = Path(tempfile.mkdtemp(prefix="sfumato-"))
    sys.stdout.flush()
    sys.stderr.flush()
    children: list[int] = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            _become(rank, count, folder)
            return
        children.append(pid)
    try:
        code = _Family(children, folder).wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(code)


def mute_others() -> None:
    """Let only the first of several processes that another program has started write results."""
    if int(os.environ.get("RANK", "0") or 0) > 0 and not is_forked():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 to the end of the process


def is_forked() -> bool:
    """Return whether this process is one of those that `start_processes` has made."""
    return STORE in os.environ


def _become(rank: int, count: int, folder: Path) -> None:
    """Make this process one of `count`."""
    die_with_parent()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // count)))
    os.environ |= {
        "WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(count), STORE: str(folder / "store"),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "NCCL_SOCKET_IFNAME": "lo", "TP_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    if rank:  # what the first one prints is enough; see `_Family`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(_log(folder, rank), os.O_WRONLY | os.O_CREAT, 0o600), 2)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(threads))


def _log(folder: Path, rank: int) -> Path:
    """Return the file for what another process than the first one prints."""
    return folder / f"process-{rank}.log"


class _Family:
    """The processes that this one has forked."""

    def __init__(self, pids: list[int], folder: Path) -> None:
        self.pids, self.folder = pids, folder
        self.codes: dict[int, int] = {}
        for name in FORWARDED:
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._forward)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        for pid in self.pids:
            if pid not in self.codes:
                self._send(pid, number)

    @staticmethod
    def _send(pid: int, number: int) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return

    def wait(self) -> int:
        """Wait for all, and return the exit code: that of the first one that has failed by itself."""
        failed_at, asked = 0.0, False
        while len(self.codes) < len(self.pids):
            self._reap()
            if not failed_at and any(self.codes.values()):
                failed_at = time.monotonic()
            waited = time.monotonic() - failed_at if failed_at else 0.0
            if waited > ALONE_S and not asked:
                asked = True
                self._forward(signal.SIGTERM, None)
            if waited > ALONE_S + ASKED_S:
                self._forward(signal.SIGKILL, None)
            time.sleep(POLL_S)
        failures = [(pid, code) for pid, code in self.codes.items() if code]
        own = [failure for failure in failures if failure[1] != PeerError.exit_code]
        pid, code = next(iter((*own, *failures)), (self.pids[0], 0))
        self._show(self.pids.index(pid))
        return code

    def _show(self, rank: int) -> None:
        """Print what a process has said that was not printed yet."""
        if (file := _log(self.folder, rank)).is_file() and (said := file.read_text()[-SHOWN:]):
            sys.stderr.write(f"process {rank} of {len(self.pids)}:\n{said}")

    def _reap(self) -> None:
        for rank, pid in enumerate(self.pids):
            if pid in self.codes:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                continue
            code = os.waitstatus_to_exitcode(status)
            if code < 0:
                name = signal.Signals(-code).name
                sys.stderr.write(
                    f"error: process {rank} of {len(self.pids)} was ended by {name}; `sfumato resume` "
                    "goes on from the newest checkpoint\n"
                )
                code = 128 - code
            self.codes[pid] = code
