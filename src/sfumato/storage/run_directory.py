"""A run on disk: which process holds it, what state it is in, and where its files go."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sfumato.distributed import current
from sfumato.errors import CheckpointError, ConfigError, RunError, without_secrets
from sfumato.foreign_models import refuse_diffusers
from sfumato.platform import HAS_FILE_LOCKS, lock_file
from sfumato.storage.atomic import atomic_path, sweep, write_text
from sfumato.storage.output_paths import require_writable

HEARTBEAT_S = 5.0
HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
BUNDLE = "bundle.json"  # in a run that was exported without its optimizer
DESCRIPTION_FILES = ("config.yaml", "local.json", "data.json", "environment.json")
LOCK = ".lock"
_held: set[Path] = set()  # runs that this process trains: its own lock does not exclude it


class RunDirectory:
    """The paths and small JSON files of one run.

    Attributes:
        writes: whether this process writes files here: the first one of those that train together.
    """

    def __init__(self, path: Path, *, root: Path | None = None) -> None:
        """Set the paths; `root` is the run that this is a stage of, by default the run itself."""
        self.path, self.root = path, root or path
        self.config = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.snapshots = path / "snapshots"
        self.averages = path / "averages"
        self.best = path / "best"
        self.verdict = self.best / "verdict.json"
        self.base_samples = path / "base_samples.safetensors"
        self.prior_images = path / "prior_images.safetensors"
        self.samples = path / "samples"
        self.metrics = path / "metrics.jsonl"
        self.looks = path / "looks.jsonl"
        self.sweep = path / "sweep.json"
        self.writes = current().is_first
        self._last_heartbeat = 0.0
        self._remarks: dict[str, Any] = {}

    @classmethod
    def require_free(cls, path: Path) -> None:
        """Raise RunError if a run cannot be created here.

        This leaves no trace, so that it can be called before the data are read.
        """
        if os.path.lexists(path / "config.yaml"):
            raise RunError(
                "there is already a run here",
                where=str(path),
                hint=f"`sfumato resume {path}`, or choose another --run",
            )
        left = sorted(path.glob("checkpoints/step-*"))
        if left or (path / "autoencoder").exists():
            raise RunError(
                "there are checkpoints of an earlier run here, which a new run would take for its "
                "own",
                where=str(left[0] if left else path / "autoencoder"),
                hint="choose another --run, or remove them",
            )
        require_writable(path, option="--run")

    @classmethod
    def create(cls, path: Path) -> RunDirectory:
        """Create a new, empty run.

        Raises:
            RunError: if there is a run already, or the folder cannot be written to.
        """
        current().on_first(partial(cls._make, path))
        return cls(path)

    @classmethod
    def _make(cls, path: Path) -> None:
        cls.require_free(path)
        try:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            (path / "samples").mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(
                f"cannot be created: {error}",
                where=str(path),
                hint="choose a folder you may write to with --run",
            ) from None

    @classmethod
    def existing(cls, path: Path) -> RunDirectory:
        """Open a run that was created before.

        Raises:
            RunError: if this is not a run; a diffusers model is named as such.
        """
        if not (path / "config.yaml").exists():
            refuse_diffusers(path)
            raise RunError(
                "is not a run: it has no config.yaml",
                where=str(path),
                hint="name a folder that `sfumato train` made",
            )
        return cls(path)

    def stage(self, name: str) -> RunDirectory:
        """Create the folder of a stage that is trained before the run's own model.

        A stage has no configuration file.
        """
        stage = RunDirectory(self.path / name, root=self.root)
        for folder in (stage.checkpoints, stage.samples) if stage.writes else ():
            folder.mkdir(parents=True, exist_ok=True)
        return stage

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold a lock on the run, so that two processes never train in one folder.

        Raises:
            RunError: if another process holds it, the folder cannot be written to, or the system or
                file system has no file locks.
        """
        if not HAS_FILE_LOCKS:
            raise RunError(
                "this system lacks the file locks (fcntl) that training needs",
                where=str(self.path),
                hint="train on Linux or macOS, on Windows inside WSL; sampling works here",
            )
        place = self.path.resolve()
        if not self.writes:
            yield
            return
        with contextlib.ExitStack() as stack:
            if self.is_held_here():  # to open and close its lock again would give it up
                raise RunError(
                    f"another process is training here: process {os.getpid()}, this one",
                    where=str(self.path),
                    hint="wait for it, or stop it first",
                )
            try:
                handle = stack.enter_context((self.path / LOCK).open("a+"))
            except OSError as error:
                raise RunError(
                    f"cannot be written to: {error.strerror}",
                    where=str(self.path),
                    hint="change its permissions, or copy the run to a folder you may write to, "
                    "and resume it there",
                ) from None
            try:
                lock_file(handle)
            except BlockingIOError:
                raise RunError(
                    f"another process is training here{self.holder()}",
                    where=str(self.path),
                    hint="wait for it, or stop it first",
                ) from None
            except OSError as error:
                raise RunError(
                    f"cannot be locked: {error.strerror}",
                    where=str(self.path),
                    hint="its file system has no locks: copy the run to a local disk, and resume "
                    "it there",
                ) from None
            _held.add(place)
            stack.callback(_held.discard, place)
            with suppress(OSError):  # the disk may be full
                handle.truncate(0)
                handle.write(f"{os.getpid()} {platform.node()}\n")
                handle.flush()
            self._sweep()
            yield

    def is_held_here(self) -> bool:
        """Return whether this process trains here."""
        return self.path.resolve() in _held

    def holder(self) -> str:
        """Return which process wrote the lock file last, as the end of a sentence; "" if unknown."""
        with suppress(OSError, ValueError):
            pid, host = (self.path / LOCK).read_text(errors="replace").split()[:2]
            return f": process {int(pid)} on {host}"
        return ""

    def _sweep(self) -> None:
        """Remove what a killed process was writing."""
        sweep(self.path)
        for folder in ("checkpoints", "snapshots", "averages", "best", "samples", "autoencoder"):
            sweep(self.path / folder, held=True)

    def has_begun(self) -> bool:
        """Return whether the run's own model has ever been saved, even if it is damaged now.

        If not, its autoencoder may still be in training.
        """
        return any(self.checkpoints.glob("step-*"))

    def require_trainable(self) -> None:
        """Raise RunError for a bundle, which has no optimizer to continue with."""
        if (self.path / BUNDLE).is_file():
            raise RunError(
                "is a bundle: it has the averaged weights only, so that training cannot continue",
                where=str(self.path),
                hint="resume the run that it was exported from",
            )

    @contextmanager
    def unchanged_if_refused(self) -> Iterator[None]:
        """Restore the files that describe the run if new settings or data are refused.

        They are refused by a CheckpointError or ConfigError, which is raised again: the run's
        checkpoints cannot continue with them.
        """
        before = {
            path: path.read_bytes()
            for path in map(self.path.joinpath, DESCRIPTION_FILES)
            if self.writes and path.is_file()
        }
        try:
            yield
        except (CheckpointError, ConfigError):
            for path, content in before.items():
                with atomic_path(path, durable=True) as temporary:
                    temporary.write_bytes(content)
            raise

    def require_space(self, needed_bytes: int) -> None:
        """Raise RunError unless `needed_bytes` are free on the run's disk."""
        free = shutil.disk_usage(self.path).free
        if free < needed_bytes:
            raise RunError(
                f"{free / 2**30:.2f} GiB free, {needed_bytes / 2**30:.2f} GiB needed for "
                "checkpoints",
                where=str(self.path),
                hint="free some space, lower checkpoint.keep, or choose another disk with --run",
            )

    def write_json(self, name: str, data: Mapping[str, Any], *, durable: bool = True) -> None:
        """Replace a JSON file of the run atomically, without secrets; for `durable`, see
        `atomic_path`. Only the first of several processes does so.
        """
        if not self.writes:
            return
        text = json.dumps(without_secrets(data), indent=1, ensure_ascii=False)
        write_text(self.path / name, text, durable=durable)

    def write_status(self, state: str, step: int, *, durable: bool = True, **more: Any) -> None:
        """Write status.json.

        Args:
            state: preparing, running, finished, interrupted, failed, stalled, or unsaved, if the
                last checkpoint could not be written.
        """
        self._last_heartbeat = time.monotonic()
        self.write_json(
            "status.json",
            durable=durable,
            data={
                "state": state,
                "step": step,
                "heartbeat": time.time(),
                "pid": os.getpid(),
                **self._remarks,
                **more,
            },
        )

    def remark(self, **more: Any) -> None:
        """Add entries to every status.json that is written from now on."""
        self._remarks |= more

    def status(self) -> dict[str, Any]:
        """Read status.json; {} if there is none yet or it is damaged."""
        try:
            return dict(json.loads((self.path / "status.json").read_text()))
        except (OSError, ValueError):
            return {}

    def data_record(self) -> dict[str, Any]:
        """Read data.json, the record of the data that the run began with; {} if unreadable."""
        try:
            return dict(json.loads((self.root / "data.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def heartbeat(self, step: int) -> None:
        """Record in status.json that the run is alive, at most once every `HEARTBEAT_S` seconds."""
        if time.monotonic() - self._last_heartbeat > HEARTBEAT_S:
            self.write_status("running", step, durable=False)

    def write_environment(self, **more: Any) -> None:
        """Write environment.json: the versions, hardware and command that explain a result."""
        self.write_json(
            "environment.json",
            {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "platform": platform.platform(),
                "cpu_threads": torch.get_num_threads(),
                "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
                **more,
            },
        )


def commit(package: Path = Path(__file__).resolve().parents[1]) -> str | None:
    """Return the git commit checked out at this program's source; None for an installed package.

    It is read from git's own files, so that git need not be installed. Uncommitted changes go
    unnoticed.
    """
    checkout = package.parent.parent  # of src/sfumato
    if not (checkout / "pyproject.toml").is_file():
        return None
    with suppress(OSError, ValueError):
        folder = checkout / ".git"
        if folder.is_file():  # a worktree's
            folder = checkout / folder.read_text().removeprefix("gitdir:").strip()
        shared = (
            folder / (folder / "commondir").read_text().strip()
            if (folder / "commondir").is_file()
            else folder
        )
        head = (folder / "HEAD").read_text().strip()
        if head.startswith("ref: "):
            head = _resolve_ref(head.removeprefix("ref: "), folder, shared)
        return head if HASH.fullmatch(head) else None
    return None


def _resolve_ref(name: str, *folders: Path) -> str:
    """Return the hash that a branch points to, read from its own file or from packed-refs.

    "" if there is none yet.
    """
    for folder in folders:
        if (folder / name).is_file():
            return (folder / name).read_text().strip()
    for folder in folders:
        packed = folder / "packed-refs"
        for line in packed.read_text().splitlines() if packed.is_file() else []:
            if line.endswith(f" {name}"):
                return line.partition(" ")[0]
    return ""
