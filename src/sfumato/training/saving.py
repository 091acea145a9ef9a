"""What a run saves: checkpoints, written beside training, the last one, and weights that are kept."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sfumato.errors import CheckpointError, UnsavedError
from sfumato.observability.progress import ProgressBar
from sfumato.platform import available_memory
from sfumato.process import signals, watchdog
from sfumato.storage import checkpoint
from sfumato.storage.untrusted import first_not_finite
from sfumato.training import post_hoc_ema
from sfumato.training.guard import WINDOW, UnstableError
from sfumato.training.hooks import SNAPSHOTS
from sfumato.training.mirror import BackgroundMirror, Mirror
from sfumato.training.parameters import count, trainable
from sfumato.training.state import average_name

if TYPE_CHECKING:
    from sfumato.training.trainer import Trainer

Groups = Mapping[str, Mapping[str, Tensor]]
ROOM = 2  # times the size of a copy that must be free for it
# seconds between attempts to write the last checkpoint: of a run that has ended, and of one that was
# asked to stop, which will soon be killed
LAST_WAITS_S, STOP_WAITS_S = (1, 2, 4, 8, 15, 30, 60, 60, 60, 60), (1, 2, 4, 8)
RETRY_S = 30.0  # after which a checkpoint that could not be written is tried again
BEST = 2  # files in best/: the kept one, and that of a checkpoint


class RunSaver:
    """Saves the state of a trainer.

    Args:
        writes_frozen: whether the frozen parameters are written beside the checkpoints; if not,
            checkpoints name their hash only.
    """

    def __init__(self, trainer: Trainer, *, writes_frozen: bool) -> None:
        self.trainer, self._writes_frozen, self._frozen = trainer, writes_frozen, ""
        self._background, self._retry_at = BackgroundWriter(), math.inf
        mirror = trainer.config.checkpoint.mirror
        self.mirror = BackgroundMirror(Mirror(mirror, trainer.directory.root)) if mirror else None

    def save(self, bar: ProgressBar) -> None:
        """Save a checkpoint beside training; if that fails, it is tried again later.

        Raises:
            UnstableError: if the weights or their average are not finite; then nothing is saved.
        """
        self._retry_at = math.inf
        tensors = self._finite_tensors()
        if self._writes:
            self._attempt(bar, lambda: self._background.begin(self._writer(), tensors))

    @property
    def _writes(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.trainer.directory.writes

    def has_failed(self, bar: ProgressBar) -> bool:
        """Say if the last checkpoint could not be written, and whether it is time to try again."""
        self._attempt(bar, self._background.raise_if_failed)
        if self.mirror is not None and (warning := self.mirror.take_warning()):
            bar.say(warning)
        return time.monotonic() > self._retry_at

    def _attempt(self, bar: ProgressBar, save: Callable[[], object]) -> None:
        try:
            save()
        except (CheckpointError, OSError) as error:
            self._retry_at = time.monotonic() + RETRY_S
            bar.say(f"warning: {error}")

    def finish(self, bar: ProgressBar) -> None:
        """Wait for what is being written and copied; how the writing ends does not matter any more."""
        self.wait()
        if self.mirror is not None:
            self.mirror.wait()
            if warning := self.mirror.take_warning():
                bar.say(warning)

    def wait_for_mirror(self) -> None:
        """Wait until all that was saved is copied, or could not be."""
        if self.mirror is not None:
            self.mirror.wait()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written."""
        with suppress(CheckpointError, OSError):
            self._background.wait()

    def save_now(self, *, replaces: bool = False) -> None:
        """Save a checkpoint, and wait for it.

        Args:
            replaces: whether one of this step is replaced; otherwise it is left as it is.
        Raises:
            CheckpointError: if it could not be written.
            UnstableError: if the weights or their average are not finite.
        """
        if (error := self._try_now(replaces=replaces)) is not None:
            raise CheckpointError(error)

    def _try_now(self, *, replaces: bool = False) -> str | None:
        """Save a checkpoint, and wait for it; return what went wrong, the same in all processes."""
        self.wait()
        tensors = self._finite_tensors()

        def write() -> str | None:
            try:
                self._writer(replaces=replaces)(tensors)
            except (CheckpointError, OSError) as error:
                return str(error)
            return None

        return self.trainer.world.on_first(write)

    def disk_bytes(self) -> int:
        """Return the bytes that checkpoints still to be written need, and a little for other files.

        A checkpoint holds the weights, their averages and two moments, in float32. One checkpoint
        more than `checkpoint.keep` exists until the oldest is removed. Snapshots are counted if the
        budget limits the steps.
        """
        config, counters = self.trainer.config, self.trainer.state.counters
        size = 4 * count(trainable(self.trainer.state.model))
        written = self.trainer.is_new and self._writes_frozen
        frozen = 4 * count(self.trainer.state.frozen_tensors().values()) if written else 0
        widths, num = len(config.post_hoc_ema.widths), config.post_hoc_ema.num
        averages = math.ceil(widths * num * (1 - counters.kept))
        snapshots = sum(counters.step < step <= (config.budget.steps or 0) for step in SNAPSHOTS)
        checkpoints = max(
            1,
            config.checkpoint.keep + 1 - len(checkpoint.paths(self.trainer.directory.checkpoints)),
        )
        best = max(0, BEST - len(list(self.trainer.directory.best.glob("step-*"))))
        result: int = (
            size * ((4 + widths) * checkpoints + averages + snapshots + best) + frozen + (16 << 20)
        )
        return result

    def save_snapshot(self) -> None:
        """Save the averaged weights of this step to a file that is never removed."""
        weights = self.trainer.state.trained(self.trainer.state.average)
        self.trainer.world.on_first(
            partial(
                _snapshot,
                self.trainer.directory.snapshots,
                step=self.trainer.state.counters.step,
                weights=weights,
            )
        )

    def save_averages(self) -> None:
        """Save the tracked averages if the next of the equal parts of the budget is over.

        Other averages are reconstructed from them after training.

        Raises:
            CheckpointError: if one could not be written; the others are written, and training
                continues.
        """
        counters, config = self.trainer.state.counters, self.trainer.config.post_hoc_ema
        fraction = min(self.trainer.progress, 1.0)
        if not counters.updates or int(fraction * config.num) <= int(counters.kept * config.num):
            return
        counters.kept = fraction
        failed: list[CheckpointError] = []
        for profile, average in self.trainer.state.tracked_averages.items():
            place, facts = (
                self.trainer.directory.averages / average_name(profile),
                {post_hoc_ema.UPDATES: str(counters.updates)},
            )
            weights = self.trainer.state.trained(average)
            try:
                self.trainer.world.on_first(
                    partial(_snapshot, place, step=counters.step, weights=weights, facts=facts)
                )
            except CheckpointError as error:
                failed.append(error)
        if failed:
            raise failed[0]

    def _finite_tensors(self) -> dict[str, dict[str, Tensor]]:
        tensors, step = self.trainer.state.tensors(), self.trainer.state.counters.step
        for group in ("model", "ema"):
            name = self.trainer.world.on_first(partial(first_not_finite, tensors[group]))
            if name is not None:
                raise UnstableError(
                    f"{group}: {name} has values that are not finite",
                    first=max(0, step - WINDOW),
                    step=step,
                )
        return tensors

    def save_last(self, bar: ProgressBar, waits_s: Sequence[float]) -> None:
        """Save the state that a run ends with; a person may free space meanwhile.

        Raises:
            UnsavedError: if that fails to the end.
        """
        for wait_s in (*waits_s, None):
            if (error := self._try_now()) is None:
                return
            asked = self.trainer.world.on_first(signals.is_stop_requested)
            if wait_s is None or (waits_s is LAST_WAITS_S and asked):
                raise self._unsaved(error)
            bar.say(
                f"warning: the last checkpoint could not be saved ({error}); trying again in "
                f"{wait_s:g} s"
            )
            _pause(wait_s)

    def _unsaved(self, error: str) -> UnsavedError:
        newest = next(iter(checkpoint.paths(self.trainer.directory.checkpoints)), None)
        step = self.trainer.state.counters.step
        with suppress(OSError):
            self.trainer.directory.write_status("unsaved", step, error=error)
        return UnsavedError(
            f"step {step} could not be saved, and is lost; the newest checkpoint is "
            f"{'missing' if newest is None else newest.name}: {error}",
            where=str(self.trainer.directory.path),
            hint=f"free some space; `sfumato resume {self.trainer.directory.root}` trains the rest again",
        )

    def _writer(self, *, replaces: bool = False) -> Callable[[Groups], object]:
        """Return what writes tensors as a checkpoint of this step, also when training has gone on."""
        self._frozen = self._frozen or self._save_frozen()
        state = {
            "counters": asdict(self.trainer.state.counters),
            "data": self.trainer.fingerprint,
            **self.trainer.task.facts,
            "plan": self.trainer.plan.hash,
            "plan_begins": self.trainer.plan.begins,
            "plan_version": self.trainer.plan.version,
            "frozen": self._frozen,
            "frozen_storage": checkpoint.storage_of(self.trainer.state.frozen_tensors()),
            "config": self.trainer.saved_config,
        }
        write = partial(
            checkpoint.save,
            self.trainer.directory.checkpoints,
            step=self.trainer.state.counters.step,
            state=state,
            keep=self.trainer.config.checkpoint.keep,
            sound=self.trainer.state.counters.sound,
            replaces=replaces,
        )

        def save_and_copy(tensors: Groups) -> None:
            write(tensors=tensors)
            if self.mirror is not None:
                self.mirror.begin()

        return save_and_copy

    def _save_frozen(self) -> str:
        """Return the hash of the frozen parameters, and write them if the run keeps them."""
        tensors = self.trainer.state.frozen_tensors()
        if not self._writes_frozen:
            return checkpoint.digest(tensors)
        return checkpoint.save_frozen(self.trainer.directory.checkpoints, tensors)


def _snapshot(place: Path, **options: Any) -> None:
    checkpoint.save_snapshot(place, **options)


def _pause(seconds: float) -> None:
    """Wait while the watchdog is told that this is meant."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        watchdog.beat()
        time.sleep(min(left, 1.0))


class BackgroundWriter:
    """Writes one checkpoint at a time, in a thread where there is memory for a copy of it."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def begin(self, write: Callable[[Groups], object], tensors: Groups) -> None:
        """Write a copy of `tensors` as they are now, once the write before has ended.

        Raises:
            CheckpointError, OSError: if the write before failed, or this one did where it could
                not be done beside training.
        """
        self.wait()
        size = sum(value.nbytes for group in tensors.values() for value in group.values())
        copies = None
        if available_memory() >= ROOM * size:
            with suppress(MemoryError):
                copies = {name: copied(group) for name, group in tensors.items()}
        if copies is None:
            write(tensors)
            return
        self._thread = threading.Thread(
            target=self._run, args=(write, copies), name="checkpoint", daemon=False
        )
        self._thread.start()

    def _run(self, write: Callable[[Groups], object], tensors: Groups) -> None:
        try:
            write(tensors)
        except (CheckpointError, OSError) as error:
            self._error = error
        except Exception as error:  # whatever it is, nothing was saved
            self._error = CheckpointError(
                f"could not be written: {type(error).__name__}: {error}", where="checkpoint"
            )

    def raise_if_failed(self) -> None:
        """Raise what went wrong in a write that has ended, once."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the write that is going on.

        Raises:
            CheckpointError, OSError: if it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return copies of tensors on the CPU; the values that share storage share it in the copies."""
    copies: dict[tuple[int, ...], Tensor] = {}
    result = {}
    for name, tensor in tensors.items():
        value = tensor.detach()
        key = (value.data_ptr(), *value.shape, *value.stride()) if value.numel() else (id(value),)
        if key not in copies:
            copies[key] = value.to("cpu", copy=True)
        result[name] = copies[key]
    return result
