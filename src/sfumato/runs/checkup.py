"""The state of a run on disk: what is wrong with it, and the command that mends it."""

from __future__ import annotations

import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sfumato.autoencoders import io as autoencoder_files
from sfumato.data.array_cache import verify_sample
from sfumato.errors import CheckpointError, ConfigError, SfumatoError
from sfumato.observability.metrics_file import read_lines
from sfumato.platform import HAS_FILE_LOCKS, is_alive, lock_file
from sfumato.recipes.autoencoder_stage import trained_folder
from sfumato.recipes.resolver import resolve
from sfumato.recipes.run_config import is_as_written, pinned_config
from sfumato.runs.base import require_base
from sfumato.storage import checkpoint
from sfumato.storage.run_directory import LOCK, RunDirectory
from sfumato.storage.untrusted import read_json

CACHES, SAMPLE = ("pixels", "latents", "embeddings"), 1000  # arrays read of each kind
OLD_HEARTBEAT_S = 60.0
SIZE_MARGIN = 1.1


@dataclass(frozen=True)
class Check:
    """What was looked at, whether it is well, what was found, and what to do if it is not."""

    what: str
    ok: bool
    found: str
    remedy: str = ""

    def lines(self) -> list[str]:
        """Return the finding for a person to read."""
        line = f"{'ok' if self.ok else '!!'}  {self.what}: {self.found}"
        return [line, *([f"      {self.remedy}"] if self.remedy else [])]

    def plain(self) -> dict[str, Any]:
        """Return the finding as plain data."""
        return asdict(self)


def check_run(path: Path) -> Iterator[Check]:
    """Yield what is found, as it is found; nothing of the run is changed.

    Raises:
        RunError: if this is not a run.
    """
    directory = RunDirectory.existing(path)
    yield _lock(directory)
    yield _status(directory)
    yield _configuration(directory)
    yield from _checkpoints(directory)
    yield from _autoencoder(directory)
    yield from _cache()
    yield from _base(directory)
    yield from _incidents(directory)
    yield _space(directory)
    yield from _file_system(directory)


def _lock(directory: RunDirectory) -> Check:
    if not HAS_FILE_LOCKS:
        return Check("lock", False, "this system has no file locks", "train on Linux or macOS")
    if directory.is_held_here():
        return Check("lock", True, "held by this process")
    file = directory.path / LOCK
    if not file.exists():
        return Check("lock", True, "no process has trained here")
    try:
        with file.open("r+") as handle:
            lock_file(handle)
    except BlockingIOError:
        return Check("lock", True, f"held{directory.holder()}")
    except OSError as error:
        return Check(
            "lock", False, f"cannot be taken: {error.strerror}", "copy the run to a local disk"
        )
    return Check("lock", True, "free")


def _status(directory: RunDirectory) -> Check:
    status, here = directory.status(), f"`sfumato resume {directory.path}` goes on"
    state, step = str(status.get("state", "missing")), status.get("step", 0)
    if not status:
        return Check(
            "status", False, "status.json is missing or damaged", f"nothing depends on it; {here}"
        )
    if state in ("running", "preparing") and not _runs(directory, status):
        return Check("status", False, f"{state} at step {step}, but no process does", here)
    ok = state not in ("failed", "unsaved", "stalled")
    error = str(status.get("error", "")).splitlines()[:1]
    return Check(
        "status",
        ok,
        f"{state} at step {step}{': ' if error else ''}{''.join(error)}",
        "" if ok else here,
    )


def _runs(directory: RunDirectory, status: dict[str, Any]) -> bool:
    """Return whether the process that wrote the status may be alive."""
    if f" on {platform.node()}" in directory.holder():
        return is_alive(int(status.get("pid", 0)))
    return time.time() - float(status.get("heartbeat", 0)) < OLD_HEARTBEAT_S


def _configuration(directory: RunDirectory) -> Check:
    text = directory.config.read_text(encoding="utf-8", errors="replace")
    if is_as_written(text):
        return Check("configuration", True, "config.yaml is as it was written")
    if pinned_config(directory.path) is None:
        return Check(
            "configuration", False, "config.yaml is not as it was written, and no checkpoint says "
            "what it was", "begin a new run, or put the file back",
        )  # fmt: skip
    return Check(
        "configuration", False, "config.yaml was cut, edited or damaged; what the checkpoint was "
        "trained with is used", f"`sfumato resume {directory.path}` writes it again",
    )  # fmt: skip


def _checkpoints(directory: RunDirectory) -> Iterator[Check]:
    found = checkpoint.paths(directory.checkpoints)
    intact = 0
    for path in found:
        try:
            size = sum(file.stat().st_size for file in path.iterdir())
            checkpoint.load(path)
            sound = read_json(path / "manifest.json").get("sound", True)
            note = "" if sound else "; its loss is unusual"
            yield Check(path.name, True, f"whole and finite, {size / 2**20:.1f} MiB{note}")
            intact += 1
        except (CheckpointError, OSError) as error:
            yield Check(
                path.name,
                False,
                _first(error),
                "`sfumato resume` sets it aside and takes the one before",
            )
    aside = sorted(path.name for path in directory.checkpoints.glob("step-*.*"))
    if aside:
        yield Check("set aside", True, f"{', '.join(aside)}; not used any more")
    if not intact:
        begun = directory.has_begun()
        yield Check(
            "checkpoints",
            not begun,
            "none is whole" if begun else "none yet",
            "copy one here from a backup, or begin a new run" if begun else "",
        )


def _autoencoder(directory: RunDirectory) -> Iterator[Check]:
    folder = trained_folder(directory.path)
    if not folder.exists():
        return
    remedy = f"`sfumato resume {directory.path}` makes it again"
    try:
        identity = autoencoder_files.identity(autoencoder_files.load(folder))
    except CheckpointError as error:
        yield Check("autoencoder", False, _first(error), remedy)
        return
    for path in checkpoint.paths(directory.checkpoints)[:1]:
        state = read_json(path / "state.json")
        if state.get("autoencoder", identity) != identity:
            yield Check(
                "autoencoder", False, "is not the one that the model was trained with", remedy
            )
            return
    yield Check("autoencoder", True, "whole, and the one that the model was trained with")


def _cache() -> Iterator[Check]:
    for kind in CACHES:
        count, damaged = verify_sample(kind, SAMPLE)
        if count:
            yield Check(
                f"cached {kind}",
                not damaged,
                f"{count} of them read, damaged: {', '.join(damaged) or 'none'}",
                "remove these folders: they are made again" if damaged else "",
            )


def _base(directory: RunDirectory) -> Iterator[Check]:
    try:
        settings = resolve(directory.path)
        if settings.base or settings.network.origin:
            require_base(settings)
            yield Check("base", True, f"{settings.base or settings.network.origin} is there")
    except (CheckpointError, ConfigError) as error:
        yield Check("base", False, _first(error), error.hint)


def _incidents(directory: RunDirectory) -> Iterator[Check]:
    incidents = sorted((directory.path / "incidents").glob("*.json"))
    if incidents:
        yield Check(
            "incidents", True, f"{len(incidents)}, the last one in {incidents[-1]}: training went "
            "back, or ended, and passed over batches",
        )  # fmt: skip
    lost = {line.get("file") for line in read_lines(directory.path / "bad_samples.jsonl")}
    if lost:
        yield Check(
            "images", False, f"{len(lost)} could not be read while training, and were replaced",
            f"see {directory.path / 'bad_samples.jsonl'}",
        )  # fmt: skip


def _space(directory: RunDirectory) -> Check:
    free = shutil.disk_usage(directory.path).free
    newest = next(iter(checkpoint.paths(directory.checkpoints)), None)
    size = 0 if newest is None else sum(file.stat().st_size for file in newest.iterdir())
    ok = free > SIZE_MARGIN * size
    return Check(
        "free space", ok, f"{free / 2**30:.2f} GiB; a checkpoint takes {size / 2**30:.2f} GiB",
        "" if ok else "free some, or lower checkpoint.keep",
    )  # fmt: skip


def _file_system(directory: RunDirectory) -> Iterator[Check]:
    """Try what training needs of the disk, in a folder that is removed again."""
    place = directory.path / f".tmp-doctor-{uuid.uuid4().hex[:8]}"
    try:
        place.mkdir()
    except OSError as error:
        yield Check(
            "disk", False, f"cannot be written to: {error.strerror}", "copy the run elsewhere"
        )
        return
    try:
        failed = [name for name, test in TESTS.items() if not _works(test, place)]
    finally:
        shutil.rmtree(place, ignore_errors=True)
    yield Check(
        "disk", not failed, f"cannot {', '.join(failed)}" if failed else f"can {', '.join(TESTS)}",
        "train on a local disk and copy the run: mounted object stores lack these operations" if failed else "",
    )  # fmt: skip


def _works(test: Callable[[Path], object], place: Path) -> bool:
    try:
        return test(place) is not False
    except OSError:
        return False


def _rename(place: Path) -> None:
    (place / "old").mkdir()
    (place / "old" / "file").write_text("1")
    os.replace(place / "old", place / "new")


def _append(place: Path) -> bool:
    for word in "ab":
        with (place / "appended").open("a") as file:
            file.write(word)
    return (place / "appended").read_text() == "ab"


def _fsync(place: Path) -> None:
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lockable(place: Path) -> bool:
    if HAS_FILE_LOCKS:
        with (place / "lock").open("w") as file:
            lock_file(file)
    return HAS_FILE_LOCKS


TESTS: dict[str, Callable[[Path], object]] = {
    "rename folders": _rename,
    "append": _append,
    "sync": _fsync,
    "lock": _lockable,
}


def _first(error: Exception) -> str:
    return error.what if isinstance(error, SfumatoError) else str(error)
