"""The training loop."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfumato.data import Batch, BatchPlan, Dataset
from sfumato.errors import CheckpointError, DataError, DivergedError, UnsavedError
from sfumato.nn.accelerable import Accelerable
from sfumato.observability.metrics_file import MetricsFile, peak_gib
from sfumato.observability.progress import Clock, ProgressBar, short
from sfumato.observability.sinks import open_sinks
from sfumato.platform import is_out_of_memory
from sfumato.process import signals, watchdog
from sfumato.process.signals import Interrupted
from sfumato.process.watchdog import Watchdog, watching
from sfumato.storage import checkpoint
from sfumato.storage.run_directory import RunDirectory
from sfumato.storage.untrusted import first_not_finite
from sfumato.training import ema, post_hoc_ema
from sfumato.training.autotune import precision_of, resolve_compile, resolve_precision
from sfumato.training.config import TrainingConfig
from sfumato.training.guard import (
    MAX_ROLLBACKS,
    NAMED,
    SKIPS_IN_A_ROW,
    WINDOW,
    Incident,
    Recent,
    UnstableError,
    has_jumped,
)
from sfumato.training.hooks import HOOKS, SNAPSHOTS, Hook, Session
from sfumato.training.parameters import count, trainable
from sfumato.training.precision import DTYPES
from sfumato.training.same_run import require_same_run
from sfumato.training.saving import Groups, Saver
from sfumato.training.state import TrainingState, average_name
from sfumato.training.stopping import STOP_AT
from sfumato.training.supply import Supply
from sfumato.training.tasks.protocol import SampleLosses, Task
from sfumato.training.timetable import Timetable

# seconds between attempts to write the last checkpoint: of a run that has ended, and of one that was
# asked to stop, which will soon be killed
LAST_WAITS_S, STOP_WAITS_S = (1, 2, 4, 8, 15, 30, 60, 60, 60, 60), (1, 2, 4, 8)
RETRY_S = 30.0  # after which a checkpoint that could not be written is tried again
BEST = 2  # files in best/: the kept one, and that of a checkpoint
LONG_S = 2.0  # seconds of measured steps, after which no further step is measured
LOST_SHARE = 0.05  # of the dataset: more unreadable images than this stop the run


class StepResult(NamedTuple):
    """The result of one optimizer step: the mean loss, the losses of its samples, the gradient norm
    of each optimized part, and whether the weights were updated.
    """

    loss: float
    losses: SampleLosses
    gradient_norms: list[float]
    applied: bool


class Trainer:
    """Trains a task's model in a run directory until its budget is spent.

    `run()` may be called again after `resume()`. The caller of either must hold the run's lock.
    """

    def __init__(
        self,
        config: TrainingConfig,
        *,
        task: Task[Any],
        dataset: Dataset,
        directory: RunDirectory,
        saved_config: Mapping[str, Any],
        hooks: Sequence[Hook] = HOOKS,
        writes_frozen: bool = True,
    ) -> None:
        """Create the state and the order of the batches; nothing is trained or written yet.

        Args:
            saved_config: the configuration as plain data, saved in checkpoints with the task's
                facts.
            hooks: run in this order.
            writes_frozen: whether the frozen parameters are written beside the checkpoints; if
                not, checkpoints name their hash only.
        """
        self.hooks = tuple(hooks)
        self.device = next(task.model.parameters()).device
        self.config, self.task, self.dataset, self.directory, self.saved_config = (
            config,
            task,
            dataset,
            directory,
            saved_config,
        )
        self.state = TrainingState.new(
            task.model, task.optimized_parts, config.post_hoc_ema.profiles
        )
        self.plan = BatchPlan(
            seed=config.seed, shapes=dataset.shapes[dataset.epoch], batch_size=config.batch_size
        )
        self._new = True
        self._frozen, self._writes_frozen = "", writes_frozen
        self._lost: set[str] = set()
        self._bad: MetricsFile | None = None
        self._began = 0
        self.timetable = Timetable(self.state)
        self._saver, self._retry_at = Saver(), math.inf
        self._recent, self._whole = Recent(), True
        self._say: Callable[[str], None] = lambda line: None
        self.uncompiled: Callable[[], AbstractContextManager[object]] = (
            nullcontext  # validation's batches would be compiled once more
        )

    def resume(self, *, accepts_data: bool = False) -> list[str]:
        """Load the newest whole checkpoint, and return warnings about newer ones that are damaged.

        Args:
            accepts_data: whether the data may have changed; a new epoch of them then begins.
        Raises:
            CheckpointError: if there is none, or the data, the seed or the batch size have changed.
        """
        loaded, warnings = checkpoint.load_newest(self.directory.checkpoints)
        changed = loaded.state.get("data") != self._fingerprint
        begins = loaded.step if accepts_data and changed else loaded.state.get("plan_begins", 0)
        self.plan = replace(self.plan, begins=int(begins))
        warnings += require_same_run(
            loaded,
            self.dataset,
            self.plan,
            self.task.facts,
            self.directory,
            accepts_data=accepts_data,
        )
        checkpoint.require_frozen(loaded, self.state.frozen_tensors())
        self.state.restore(loaded.tensors, loaded.counters)
        counters = self.state.counters
        counters.kept = min(counters.kept, self.progress)  # the budget may have been raised
        post_hoc_ema.forget(self.directory.averages, after=counters.step)
        self._new = False
        return warnings

    @property
    def finished(self) -> bool:
        """Whether the budget is spent, or the run has stopped at a verdict."""
        return self.progress >= 1 or self.state.counters.stopped in STOP_AT[self.config.stop]

    @property
    def views(self) -> float:
        """How often each training image was seen, on average."""
        return self.state.counters.samples_seen / self.plan.size

    def run(self) -> None:
        """Train to the end of the budget.

        Raises:
            Interrupted: after a signal, with a checkpoint saved.
            DivergedError: after too many non-finite steps in a row.
        """
        with (
            signals.handled(),
            watching(self.config.stall_minutes) as guardian,
            ProgressBar("training") as bar,
        ):
            self._watched_by(guardian)
            self._say = bar.say
            self._prepare(bar)
            session, self._began = self._session(bar), self.state.counters.step
            try:
                self._loop(session)
            except Interrupted as signal:
                self._stop(signal, bar)
                raise
            except BaseException as error:
                if isinstance(error, DataError):  # between two steps: nothing need be lost
                    self._save_last(bar, STOP_WAITS_S)
                state = "unsaved" if isinstance(error, UnsavedError) else "failed"
                with suppress(OSError):  # the disk may be why
                    self.directory.write_status(state, self.state.counters.step, error=str(error))
                raise
            finally:
                guardian.on_stall = lambda message: None
                for sink in (*session.sinks, *([] if self._bad is None else [self._bad])):
                    with suppress(OSError):
                        sink.close()
                self._bad = None
                with suppress(CheckpointError, OSError):
                    self._saver.wait()
            self.directory.write_status("finished", self.state.counters.step)

    def _stop(self, signal: Interrupted, bar: ProgressBar) -> None:
        """Save, and say how to go on."""
        step = self.state.counters.step
        try:
            self._save_last(bar, STOP_WAITS_S)
            done = f"saved at step {step}"
        except UnstableError as trouble:
            done = f"step {step} is not saved, since {trouble.what}"
        self.directory.write_status("interrupted", step, signal=str(signal))
        signal.is_said = True
        bar.say(f"{signal}: {done}; `sfumato resume {self.directory.root}` goes on from there")

    def _watched_by(self, guardian: Watchdog) -> None:
        """Have the watchdog save what is whole, and write its stacks into the run."""

        def save(message: str) -> None:
            step = self.state.counters.step
            self.directory.write_status("stalled", step, error=message)
            if self._whole:  # the main thread waits for data, or for a hook
                self._saver.wait()
                self._writer()(self.state.tensors())

        guardian.seconds = 60 * self.config.stall_minutes
        guardian.file, guardian.on_stall = self.directory.path / "stacks.txt", save

    def _session(self, bar: ProgressBar) -> Session:
        metrics = MetricsFile(self.directory.metrics, after_step=self.state.counters.step)
        name, folder = (
            str(self.saved_config.get("name", self.directory.path.name)),
            self.directory.path,
        )
        others = open_sinks(
            self.config.log.sinks, folder=folder, name=name, config=self.saved_config
        )
        return Session(bar=bar, sinks=[metrics, *others])

    def _prepare(self, bar: ProgressBar) -> None:
        """Choose precision and compilation, check the disk, and save a first checkpoint if the run
        is new.
        """
        counters, network = self.state.counters, self._resolve_precision(bar.say)
        if resolve_compile(
            self.config, counters, network, images=self.plan.size, trial=self._trial, say=bar.say
        ):
            self.uncompiled = partial(torch.compiler.set_stance, "force_eager")
        self.directory.require_space(self.disk_bytes())
        if self._new:
            self._writer()(self.state.tensors())
        self.directory.write_status("running", counters.step)

    def measure_step(self, *, steps: int = 3) -> float:
        """Return the median seconds of a few real training steps, not compiled.

        The first step warms up; if it is long, it is the only one. The trainer cannot be used
        afterwards.
        """
        self._resolve_precision(lambda line: None)
        supply = Supply(self.dataset, self.plan, start=0, say=self._say)
        seconds: list[float] = []
        while len(seconds) <= steps and sum(seconds) < LONG_S:
            begun = time.perf_counter()
            self.train_step(next(supply))
            seconds.append(time.perf_counter() - begun)
        return statistics.median(seconds[1:] or seconds)

    def disk_bytes(self) -> int:
        """Return the bytes that checkpoints still to be written need, and a little for other files.

        A checkpoint holds the weights, their averages and two moments, in float32. One checkpoint
        more than `checkpoint.keep` exists until the oldest is removed. Snapshots are counted if the
        budget limits the steps.
        """
        config, counters = self.config, self.state.counters
        size = 4 * count(trainable(self.state.model))
        written = self._new and self._writes_frozen
        frozen = 4 * count(self.state.frozen_tensors().values()) if written else 0
        widths, num = len(config.post_hoc_ema.widths), config.post_hoc_ema.num
        averages = math.ceil(widths * num * (1 - counters.kept))
        snapshots = sum(counters.step < step <= (config.budget.steps or 0) for step in SNAPSHOTS)
        checkpoints = max(
            1, config.checkpoint.keep + 1 - len(checkpoint.paths(self.directory.checkpoints))
        )
        best = max(0, BEST - len(list(self.directory.best.glob("step-*"))))
        result: int = (
            size * ((4 + widths) * checkpoints + averages + snapshots + best) + frozen + (16 << 20)
        )
        return result

    def _resolve_precision(self, say: Callable[[str], None]) -> Accelerable:
        """Choose the precision, and return the part of the model that is computed in it."""
        network = self.task.compiled_part(self.state.model)
        resolve_precision(self.config, self.state.counters, network, say=say)
        return network

    def _loop(self, session: Session) -> None:
        """Train to the end, and go back where training has left its course."""
        while True:
            try:
                self._train(session)
                self._save_last(session.bar, LAST_WAITS_S)
                return
            except UnstableError as trouble:
                self._go_back(trouble, session)

    def _train(self, session: Session) -> None:
        start = self.state.counters.step
        supply = Supply(self.dataset, self.plan, start=start, say=session.bar.say)
        try:
            self._train_on(supply, session)
        finally:
            supply.close()

    def _train_on(self, supply: Supply, session: Session) -> None:
        counters, bar = self.state.counters, session.bar
        clock = Clock(counters.seconds, counters.step)
        bar.start_at(self.progress)
        while True:
            signals.poll()
            finished = self.finished
            if counters.step != counters.watched or finished:
                self._between_steps(session, finished)
            if finished:
                return
            waited = time.perf_counter()
            batch = next(supply)
            clock.wait(time.perf_counter() - waited)
            self._record_unreadable(batch, bar)
            if counters.is_passed_over:
                self._pass_over()
                continue
            result = self.train_step(batch)
            self._guard(result, bar)
            counters.seconds = clock.seconds()
            if counters.step % self.config.log.every_steps == 0 or counters.step == 1:
                self._log(result, clock, session)

    def _log(self, result: StepResult, clock: Clock, session: Session) -> None:
        """Write the record of a step to the sinks, and show it."""
        record, step = self._record(result, clock), self.state.counters.step
        session.write(record)
        speed = f"{record['perf/images_per_s']:.0f} images/s"
        figures = (
            f"loss {short(result.loss)}  lr {record['train/lr']:.1e}  |g| "
            f"{result.gradient_norms[0]:.2f}  {speed}"
        )
        self._try(session.bar, partial(self.directory.heartbeat, step))
        session.bar.update(
            min(self.progress, 1.0), f"step {step}  {figures}  {record['memory/peak_gib']:.1f} GiB"
        )

    def _pass_over(self) -> None:
        """Count a batch that is not trained on."""
        self.state.counters.step += 1
        self.state.counters.samples_seen += self.config.batch_size

    def _guard(self, result: StepResult, bar: ProgressBar) -> None:
        """Say which step was skipped.

        Raises:
            UnstableError: if too many were in a row, or the loss has jumped.
        """
        counters = self.state.counters
        step = counters.step - 1  # whose batch it was
        self._recent.add(step, result.loss, result.gradient_norms, applied=result.applied)
        if not result.applied and counters.skipped <= NAMED:
            names = self.image_names(step)
            more = "" if len(names) <= NAMED else f", and {len(names) - NAMED} more"
            bar.say(
                f"step {step} is skipped: its loss or gradient is not finite; its images: "
                f"{', '.join(names[:NAMED])}{more}"
            )
        if counters.skipped_in_a_row >= SKIPS_IN_A_ROW:
            raise UnstableError(
                f"{SKIPS_IN_A_ROW} steps in a row had a non-finite loss or gradient",
                first=counters.step - SKIPS_IN_A_ROW,
                step=counters.step,
            )
        if result.applied and has_jumped(counters.losses):
            raise UnstableError(
                f"the loss has jumped to {short(counters.loss)}",
                first=max(0, counters.step - WINDOW),
                step=counters.step,
            )

    def image_names(self, step: int) -> list[str]:
        """Return the names of the images of a batch."""
        positions = self.dataset.epoch[self.plan.batch(step)]
        return [self.dataset.entries[position].name for position in positions]

    def _go_back(self, trouble: UnstableError, session: Session) -> None:
        """Load the newest checkpoint from before the trouble; its batches are then passed over.

        Raises:
            DivergedError: if there is none, or training has gone back too often.
        """
        counters, directory = self.state.counters, self.directory
        with suppress(CheckpointError, OSError):
            self._saver.wait()
        sound = checkpoint.set_diverged_aside(directory.checkpoints)
        gives_up = sound is None or counters.rollbacks >= MAX_ROLLBACKS
        first, last = max(trouble.first, sound or 0), counters.step - 1
        incident = Incident(
            reason=trouble.what,
            first=first,
            last=last,
            resumed_from=None if gives_up else sound,
            steps=self._recent.rows(),
        )
        file = incident.write(self)
        if gives_up:
            raise self._given_up(trouble, sound, file)
        loaded, _ = checkpoint.load_newest(directory.checkpoints)
        self.state.restore(loaded.tensors, loaded.counters)
        self.state.counters.record_rollback(counters, first, last)
        post_hoc_ema.forget(directory.averages, after=self.state.counters.step)
        for hook in self.hooks:
            hook.go_back(self)
        session.go_back(self.state.counters.step)
        session.bar.say(
            f"warning: {trouble.what} at {trouble.where}: training goes back to step {sound}, and "
            f"the batches of steps {first} to {last} are passed over; what is known of them: {file}"
        )

    def _given_up(self, trouble: UnstableError, sound: int | None, file: Path) -> DivergedError:
        start = (
            ""
            if sound is None
            else f"; `sfumato resume {self.directory.root}` begins at step {sound}, before the "
            "loss rose"
        )
        again = self.state.counters.rollbacks
        return DivergedError(
            trouble.what + (f", after going back {again} times" if again else ""),
            where=f"{trouble.where}; what is known of it: {file}",
            hint=f"{trouble.hint}{start}",
        )

    def _between_steps(self, session: Session, finished: bool) -> None:
        """Run the hooks that are due at this step, then save a checkpoint if one is due.

        The checkpoint comes last and records that the hooks were run, so that a run resumed from it
        does not repeat them. While steps are skipped, none is saved. The last one is not saved here.
        """
        counters = self.state.counters
        for hook in self.hooks:
            if hook.due(self, finished=finished):
                try:
                    hook.run(self, session)
                except hook.tolerated as error:
                    session.bar.say(f"warning: {hook.name} at step {counters.step} failed: {error}")
        counters.watched = counters.step
        asked = signals.take_save_request()
        due = (
            asked
            or self.timetable.due("checkpoint", self.config.checkpoint)
            or time.monotonic() > self._retry_at
        )
        self._attempt(session.bar, self._saver.raise_if_failed)
        if due and not finished and not counters.skipped_in_a_row:
            with self.timetable.recording("checkpoint"):
                self._attempt(session.bar, self._save)
            if asked:
                session.bar.say(f"SIGUSR1: step {counters.step} is saved; training goes on")

    def _attempt(self, bar: ProgressBar, save: Callable[[], object]) -> None:
        """Save, and try again later if that fails."""
        try:
            save()
        except (CheckpointError, OSError) as error:
            self._retry_at = time.monotonic() + RETRY_S
            bar.say(f"warning: {error}")

    def validate(self) -> dict[str, Any]:
        """Return the task's errors on held-out images, of the weights and their average."""
        with self.uncompiled():
            return self.task.validate(self.state.model, self.state.average)

    def _try(self, bar: ProgressBar, write: Callable[[], object]) -> None:
        """Call `write`, and only warn if it fails: a temporarily full disk need not end a run."""
        try:
            write()
        except (CheckpointError, OSError) as error:
            bar.say(f"warning: {error}")

    def train_step(self, batch: Batch) -> StepResult:
        """Take one optimizer step on a global batch.

        Gradients are summed over micro-batches and clipped, then the weights and their averages are
        updated. A non-finite loss or gradient leaves weights, averages and the learning-rate
        schedule as they are.
        """
        self._whole = False
        state, config = self.state, self.config
        counters = state.counters
        losses = self._backward_in_memory(batch, self._dtype)
        # The step's only wait for the device: whether the weights may move is decided here, on the
        # host.
        loss, *norms = torch.stack(
            [losses.per_sample.mean(), *(part.clip() for part in state.optimized_parts)]
        ).tolist()
        applied = all(map(math.isfinite, (loss, *norms)))
        if applied:
            for part in state.optimized_parts:
                part.step(counters.updates, self.progress)
            counters.record_update(loss)
            ema.update(state.pairs, config.ema, counters.updates)
            for profile, pairs in state.tracked_pairs.items():
                ema.update(pairs, profile, counters.updates)
        else:
            counters.record_skip()
        self._zero_grad()
        counters.step += 1
        counters.samples_seen += config.batch_size
        self._whole = True
        return StepResult(loss, losses, norms, applied)

    def _backward_in_memory(self, batch: Batch, dtype: torch.dtype) -> SampleLosses:
        """Run `_backward`, in smaller micro-batches where memory does not suffice.

        Gradients are the same up to rounding; what draws by micro-batch, such as dropout, is not.
        """
        while True:
            try:
                return self._backward(batch, dtype)
            except (MemoryError, RuntimeError) as error:
                size = min(self._micro_batch, len(batch))
                if not is_out_of_memory(error) or size == 1:
                    raise
            self._zero_grad()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.state.counters.micro_batch = size // 2
            self._say(
                f"warning: not enough memory at step {self.state.counters.step} for micro-batches of "
                f"{size}: from here on they have {size // 2}; the batch, and so the result, is the "
                "same"
            )

    @property
    def _micro_batch(self) -> int:
        return self.state.counters.micro_batch or self.config.effective_micro_batch

    def _backward(self, batch: Batch, dtype: torch.dtype) -> SampleLosses:
        """Accumulate the gradient of the batch's mean loss, and return the losses.

        The batch is split into groups of one shape, and these into micro-batches.
        """
        if not self.state.model.training:  # the walk through all modules takes its time
            self.state.model.train()
        size, progress = self._micro_batch, self.progress
        micro_batches = []
        for group in batch.groups:
            for begin in range(0, len(group), size):
                chosen = slice(begin, min(begin + size, len(group)))
                losses = self.task.loss(
                    self.state.model, batch, group, chosen, progress=progress, dtype=dtype
                )
                (losses.per_sample.sum() / len(batch)).backward()
                micro_batches.append(losses)
        notes = {
            name: torch.cat([losses.notes[name].detach() for losses in micro_batches])
            for name in micro_batches[0].notes
        }
        return SampleLosses(
            torch.cat([losses.per_sample.detach() for losses in micro_batches]), notes
        )

    def _trial(self) -> Callable[[torch.dtype], None]:
        """Return a function that runs one forward and backward pass, and changes nothing."""
        batch = next(Supply(self.dataset, self.plan, start=0, say=self._say))

        def work(dtype: torch.dtype) -> None:
            self._backward(batch, dtype)
            self._zero_grad()

        return work

    def _zero_grad(self) -> None:
        for part in self.state.optimized_parts:
            part.zero_grad()

    @property
    def _dtype(self) -> torch.dtype:
        return DTYPES[precision_of(self.config, self.state.counters)]

    @property
    def progress(self) -> float:
        """The fraction of the budget that is used."""
        counters = self.state.counters
        return self.config.budget.progress(
            steps=counters.step,
            samples=counters.samples_seen,
            epochs=self.views,
            seconds=counters.seconds,
        )

    def save_snapshot(self) -> Path:
        """Save the averaged weights of this step to a file that is never removed."""
        return checkpoint.save_snapshot(
            self.directory.snapshots,
            step=self.state.counters.step,
            weights=self.state.trained(self.state.average),
        )

    def save_averages(self) -> None:
        """Save the tracked averages if the next of the equal parts of the budget is over.

        Other averages are reconstructed from them after training.

        Raises:
            CheckpointError: if one could not be written; the others are written, and training
                continues.
        """
        counters, config = self.state.counters, self.config.post_hoc_ema
        fraction = min(self.progress, 1.0)
        if not counters.updates or int(fraction * config.num) <= int(counters.kept * config.num):
            return
        counters.kept = fraction
        failed: list[CheckpointError] = []
        for profile, average in self.state.tracked_averages.items():
            place, facts = (
                self.directory.averages / average_name(profile),
                {post_hoc_ema.UPDATES: str(counters.updates)},
            )
            try:
                checkpoint.save_snapshot(
                    place, step=counters.step, weights=self.state.trained(average), facts=facts
                )
            except CheckpointError as error:
                failed.append(error)
        if failed:
            raise failed[0]

    def _save(self) -> None:
        """Save a checkpoint beside training.

        Raises:
            UnstableError: if the weights or their average are not finite; then nothing is saved.
        """
        self._retry_at = math.inf
        self._saver.begin(self._writer(), self._finite_tensors())

    def _finite_tensors(self) -> dict[str, dict[str, Tensor]]:
        tensors, step = self.state.tensors(), self.state.counters.step
        for group in ("model", "ema"):
            if (name := first_not_finite(tensors[group])) is not None:
                raise UnstableError(
                    f"{group}: {name} has values that are not finite",
                    first=max(0, step - WINDOW),
                    step=step,
                )
        return tensors

    def _save_last(self, bar: ProgressBar, waits_s: Sequence[float]) -> None:
        """Save the state that a run ends with; a person may free space meanwhile.

        Raises:
            UnsavedError: if that fails to the end.
        """
        for wait_s in (*waits_s, None):
            try:
                with suppress(CheckpointError, OSError):  # of the one before
                    self._saver.wait()
                self._writer()(self._finite_tensors())
                return
            except (CheckpointError, OSError) as error:
                if wait_s is None:
                    raise self._unsaved(error) from None
                bar.say(
                    f"warning: the last checkpoint could not be saved ({error}); trying again in "
                    f"{wait_s:g} s"
                )
                self._pause(wait_s)

    def _pause(self, seconds: float) -> None:
        """Wait while the watchdog is told that this is meant."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            watchdog.beat()
            time.sleep(min(left, 1.0))

    def _unsaved(self, error: Exception) -> UnsavedError:
        newest = next(iter(checkpoint.paths(self.directory.checkpoints)), None)
        step = self.state.counters.step
        with suppress(OSError):
            self.directory.write_status("unsaved", step, error=str(error))
        return UnsavedError(
            f"step {step} could not be saved, and is lost; the newest checkpoint is "
            f"{'missing' if newest is None else newest.name}: {error}",
            where=str(self.directory.path),
            hint=f"free some space; `sfumato resume {self.directory.root}` trains the rest again",
        )

    def _writer(self) -> Callable[[Groups], object]:
        """Return what writes tensors as a checkpoint of this step, also when training has gone on."""
        self._frozen = self._frozen or self._save_frozen()
        state = {
            "counters": asdict(self.state.counters),
            "data": self._fingerprint,
            **self.task.facts,
            "plan": self.plan.hash,
            "plan_begins": self.plan.begins,
            "frozen": self._frozen,
            "frozen_storage": checkpoint.storage_of(self.state.frozen_tensors()),
            "config": self.saved_config,
        }
        write = partial(
            checkpoint.save,
            self.directory.checkpoints,
            step=self.state.counters.step,
            state=state,
            keep=self.config.checkpoint.keep,
            sound=self.state.counters.sound,
        )
        return lambda tensors: write(tensors=tensors)

    @cached_property
    def _fingerprint(self) -> str:
        return self.dataset.fingerprint

    def _save_frozen(self) -> str:
        """Return the hash of the frozen parameters, and write them if the run keeps them."""
        tensors = self.state.frozen_tensors()
        if not self._writes_frozen:
            return checkpoint.digest(tensors)
        return checkpoint.save_frozen(self.directory.checkpoints, tensors)

    def _record(self, result: StepResult, clock: Clock) -> dict[str, Any]:
        counters = self.state.counters
        images_per_s, wait_ms = clock.lap(self.config.batch_size, counters.step)
        return {
            "step": counters.step,
            "samples_seen": counters.samples_seen,
            "epoch": self.views,
            "time": counters.seconds,
            "train/loss": result.loss,
            **self.task.log_metrics(result.losses.on_host()),
            "train/grad_norm": result.gradient_norms[0],
            "train/lr": self.state.optimized_parts[0].rate,
            **{
                f"train/{part.name}/grad_norm": norm
                for part, norm in zip(
                    self.state.optimized_parts[1:], result.gradient_norms[1:], strict=True
                )
            },
            "train/skipped": counters.skipped,
            "perf/images_per_s": images_per_s,
            "perf/data_wait_ms": wait_ms,
            "memory/peak_gib": peak_gib(self.device),
        }

    def _record_unreadable(self, batch: Batch, bar: ProgressBar) -> None:
        if batch.bad:
            self._lost.update(bad.name for bad in batch.bad)
            if len(self._lost) > max(20, LOST_SHARE * len(self.dataset.entries)):
                raise DataError(
                    f"{len(self._lost)} images could not be read any more, e.g. "
                    f"{batch.bad[0].name}: {batch.bad[0].reason}",
                    where=str(self.directory.path / "bad_samples.jsonl"),
                    hint="check that the disk is still mounted restore the images, then `sfumato resume`",
                )
            self._try(bar, partial(self._write_bad, batch))
            bar.say(
                f"replaced {len(batch.bad)} image(s) that can no longer be read, e.g. "
                f"{batch.bad[0].name}"
            )

    def _write_bad(self, batch: Batch) -> None:
        # opened once: it removes the lines of steps that are trained again
        if self._bad is None:
            self._bad = MetricsFile(
                self.directory.path / "bad_samples.jsonl", after_step=self._began
            )
        for bad in batch.bad:
            self._bad.write(
                {"step": self.state.counters.step, "file": bad.name, "reason": bad.reason}
            )
