"""A copy of a run in another place: on a store of objects, or on another disk.

A checkpoint there is whole, or is not seen: its manifest is written last, and older ones are removed
afterwards. An empty machine goes on from it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sfumato.data.files import UnsafePath, check_relative
from sfumato.data.remote import filesystem
from sfumato.errors import CheckpointError, RunError, SfumatoError, redact_secrets
from sfumato.process import watchdog
from sfumato.storage.atomic import atomic_folder, atomic_path
from sfumato.storage.checkpoint import MANIFEST, require_whole

T = TypeVar("T")

ATTEMPTS, PAUSE_S = 3, 0.5  # of each call to the store, and the first pause, which doubles
# what is of this machine only, or can be made again
LEFT_OUT = (".lock", "local.json", "stacks.txt")
FOLDERS_LEFT_OUT = ("generated",)
CHECKPOINTS = "checkpoints"
PRUNED = ("averages", "best")  # other folders whose files a run removes


class MirrorError(SfumatoError):
    """A mirror that cannot be read or written."""


class Mirror:
    """The copy of one run.

    Args:
        url: any address of fsspec, such as s3://bucket/run, or a folder.
        run: the run's directory.
    """

    def __init__(self, url: str, run: Path) -> None:
        self.url, self.run = url, run
        self._sent: dict[str, tuple[int, int]] = {}
        self._checkpoints: dict[str, bytes] = {}  # that are there, with their manifests

    def require_free(self) -> None:
        """Raise RunError if there is a run at the address already, which a new one would replace."""
        system, root = self._opened()
        if self._try(partial(system.exists, f"{root}/config.yaml")):
            raise RunError(
                "holds a run already, which a new one would replace",
                where=self.url,
                hint="`sfumato resume RUN --mirror URL` goes on with it; or choose another "
                "checkpoint.mirror",
            )

    def push(self) -> None:
        """Make the copy equal to the run: its files, then its checkpoints, each with its manifest
        last; then remove what the run has removed.

        Raises:
            MirrorError: if the store cannot be written to; a checkpoint that is there stays whole.
        """
        system, root = self._opened()
        steps = sorted(path for path in (self.run / CHECKPOINTS).glob("step-?????????"))
        for path in self._files():
            self._send(system, root, path)
        for step in reversed(steps):
            self._send_checkpoint(system, root, step)
        kept = {step.name for step in steps}
        # older ones stay until one of these is whole there
        for name in self._steps(system, root) - kept if kept & set(self._checkpoints) else ():
            place = f"{root}/{CHECKPOINTS}/{name}"
            if self._try(partial(system.exists, f"{place}/{MANIFEST}")):
                self._try(partial(system.rm_file, f"{place}/{MANIFEST}"))
            self._try(partial(system.rm, place, recursive=True))
        for folder in PRUNED:
            for name in self._listed(system, f"{root}/{folder}"):
                if not (self.run / folder / name).exists():
                    self._try(partial(system.rm_file, f"{root}/{folder}/{name}"))

    def try_push(self) -> str:
        """Make the copy equal to the run; return a warning if that fails, "" if not."""
        try:
            self.push()
        except Exception as error:  # whatever a store raises, training goes on
            name = "" if isinstance(error, SfumatoError | OSError) else f"{type(error).__name__}: "
            return f"warning: the mirror is not up to date, the run itself is: {name}{error}"
        return ""

    def pull(self) -> Path:
        """Copy the run to this machine, with its newest whole checkpoint; return that.

        Raises:
            MirrorError: if there is none, or the store cannot be read.
        """
        system, root = self._opened()
        if not self._try(lambda: system.exists(f"{root}/config.yaml")):
            raise MirrorError(
                "holds no run", where=self.url, hint="name the address that checkpoint.mirror had"
            )
        refused: list[str] = []
        for name in sorted(self._steps(system, root), reverse=True):
            manifest = f"{root}/{CHECKPOINTS}/{name}/{MANIFEST}"
            if not self._try(partial(system.exists, manifest)):
                continue
            try:
                return self._fetch(system, root, name)
            except CheckpointError as error:
                refused.append(str(error))
        raise MirrorError(
            "holds no whole checkpoint" + "".join(f"; {line}" for line in refused), where=self.url,
            hint="train a new run",
        )  # fmt: skip

    def _fetch(self, system: Any, root: str, step: str) -> Path:
        """Copy a checkpoint, and the other files of the run; the configuration comes last."""
        final = self.run / CHECKPOINTS / step
        with atomic_folder(final, durable=True) as temporary:
            for place in self._listed(system, f"{root}/{CHECKPOINTS}/{step}"):
                self._get(system, f"{root}/{CHECKPOINTS}/{step}/{place}", temporary / place)
            require_whole(temporary)
        names = [
            name
            for name in self._listed(system, root)
            if not name.startswith(f"{CHECKPOINTS}/step-") and name not in LEFT_OUT
        ]
        for name in sorted(names, key=lambda name: name == "config.yaml"):
            target = self.run / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(target, durable=True) as temporary:
                self._get(system, f"{root}/{name}", temporary)
        (self.run / "samples").mkdir(exist_ok=True)
        return final

    def _files(self) -> Iterator[Path]:
        """Yield the files of the run besides its checkpoints."""
        for path in sorted(self.run.rglob("*")):
            parts = path.relative_to(self.run).parts
            if (
                path.is_symlink()
                or not path.is_file()
                or any(part.startswith(".tmp-") for part in parts)
            ):
                continue
            if parts[0] in FOLDERS_LEFT_OUT or path.name in LEFT_OUT:
                continue
            if CHECKPOINTS in parts[:-1] and parts[parts.index(CHECKPOINTS) + 1].startswith(
                "step-"
            ):
                continue
            yield path

    def _send_checkpoint(self, system: Any, root: str, step: Path) -> None:
        """Write a checkpoint, its manifest last, unless one with the same manifest is there.

        One that training removes meanwhile is not seen there: its manifest is not written.
        """
        try:
            manifest = (step / MANIFEST).read_bytes()  # which has the hashes of all files
            paths = sorted(step.iterdir(), key=lambda path: path.name == MANIFEST)
        except FileNotFoundError:
            return
        if self._checkpoints.get(step.name) == manifest:
            return
        place = f"{root}/{CHECKPOINTS}/{step.name}/{MANIFEST}"
        if self._try(partial(system.exists, place)):
            if self._try(partial(system.cat_file, place)) == manifest:
                self._checkpoints[step.name] = manifest
                return
            self._try(partial(system.rm_file, place))
        if all(self._send(system, root, path) for path in paths):
            self._checkpoints[step.name] = manifest

    def _send(self, system: Any, root: str, path: Path) -> bool:
        """Write a file, unless it was written as it is now; return False if it is gone."""
        name = path.relative_to(self.run).as_posix()
        try:
            status = path.stat()
            state = (status.st_size, status.st_mtime_ns)
            if self._sent.get(name) != state:
                parent = f"{root}/{name}".rpartition("/")[0]
                self._try(lambda: system.makedirs(parent, exist_ok=True))
                self._try(partial(system.put_file, str(path), f"{root}/{name}"))
                self._sent[name] = state
        except (FileNotFoundError, MirrorError):
            if path.exists():
                raise
            return False  # training has gone on, and removed it
        return True

    def _get(self, system: Any, place: str, target: Path) -> None:
        self._try(partial(system.get_file, place, str(target)))

    def _steps(self, system: Any, root: str) -> set[str]:
        """Return the names of the checkpoints there, also of those that are not whole."""
        place = f"{root}/{CHECKPOINTS}"
        if not self._try(lambda: system.exists(place)):
            return set()
        names = {
            str(entry).rstrip("/").rpartition("/")[2]
            for entry in self._try(lambda: system.ls(place, detail=False))
        }
        return {name for name in names if name.startswith("step-") and name[5:].isdecimal()}

    def _listed(self, system: Any, place: str) -> list[str]:
        """Return the names of all files below a place; none of them leads elsewhere."""
        prefix = place.lstrip("/") + "/"
        if not self._try(partial(system.exists, place)):
            return []
        names = [
            str(found).lstrip("/").removeprefix(prefix)
            for found in self._try(partial(system.find, place))
        ]
        try:
            return [check_relative(name) for name in names]
        except UnsafePath as error:
            raise MirrorError(
                str(error), where=self.url, hint="this is not a mirror of a run"
            ) from None

    def _opened(self) -> tuple[Any, str]:
        system, root = filesystem(self.url)
        self._try(system.invalidate_cache)
        return system, root.rstrip("/")

    def _try(self, call: Callable[[], T]) -> T:
        """Call the store, and again after a pause if that fails."""
        for attempt in range(ATTEMPTS):
            try:
                result = call()
                watchdog.beat()  # the main thread may wait for this one
                return result
            except FileNotFoundError as error:
                raise MirrorError(f"is missing: {error}", where=self.url) from None
            except Exception as error:  # each store has its own
                watchdog.beat()
                if attempt == ATTEMPTS - 1:
                    raise MirrorError(
                        f"{type(error).__name__}: {redact_secrets(str(error))[:200]}", where=self.url,
                        hint="check the address, the network and your credentials for it",
                    ) from None  # fmt: skip
                time.sleep(PAUSE_S * 2**attempt)
        raise AssertionError


class BackgroundMirror:
    """Copies a run in a thread; what is saved while a copy is made is copied by the next one."""

    def __init__(self, mirror: Mirror) -> None:
        self.mirror, self._lock = mirror, threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_due, self._warning = False, ""

    def begin(self) -> None:
        """Begin a copy of the run as it is now, or one that follows the copy that is being made."""
        with self._lock:
            self._is_due = True
            if self._thread is None:
                # a process that must end does not wait: what is not whole there is not seen
                thread = threading.Thread(target=self._run, name="mirror", daemon=True)
                thread.start()
                self._thread = thread

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._is_due:
                    self._thread = None
                    return
                self._is_due = False
            self._warning = self.mirror.try_push()

    def wait(self) -> None:
        """Wait until all that was saved is copied, or could not be."""
        while (thread := self._thread) is not None:
            thread.join()

    def take_warning(self) -> str:
        """Return what kept the last copy from being made, once; "" if nothing did."""
        warning, self._warning = self._warning, ""
        return warning


def restore(url: str, run: Path) -> Path:
    """Copy a run from its mirror into a folder that has none; return its newest checkpoint.

    Raises:
        RunError: if there is a run already.
        MirrorError: if there is none at the address.
    """
    if (run / "config.yaml").exists():
        raise RunError(
            "there is already a run here", where=str(run),
            hint="resume it without --mirror, or name an empty folder",
        )  # fmt: skip
    return Mirror(url, run).pull()
