"""The training loop."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from sfumato.data import Batch, Dataset, ShapeGroup
from sfumato.distributed import current, is_agreed
from sfumato.distributed.sharding import Engine
from sfumato.errors import CheckpointError, DataError, UnsavedError
from sfumato.nn.accelerable import Accelerable
from sfumato.observability.metrics_file import MetricsFile, peak_gib
from sfumato.observability.progress import Clock, ProgressBar, short
from sfumato.observability.sinks import Sink, open_sinks
from sfumato.platform import is_out_of_memory
from sfumato.process import signals
from sfumato.process.signals import Interrupted
from sfumato.process.watchdog import Watchdog, watching
from sfumato.storage import checkpoint
from sfumato.storage.run_directory import RunDirectory
from sfumato.training import ema, post_hoc_ema
from sfumato.training.autotune import precision_of, resolve_compile, resolve_precision
from sfumato.training.config import TrainingConfig
from sfumato.training.guard import Recent, UnstableError, go_back, judge
from sfumato.training.hooks import HOOKS, Hook, Session
from sfumato.training.precision import DTYPES
from sfumato.training.same_run import plan_version, require_same_run
from sfumato.training.saving import LAST_WAITS_S, STOP_WAITS_S, RunSaver
from sfumato.training.state import TrainingState
from sfumato.training.stopping import STOP_AT
from sfumato.training.supply import Supply
from sfumato.training.tasks.protocol import SampleLosses, Task
from sfumato.training.timetable import Timetable
from sfumato.training.unreadable import UnreadableImages

LONG_S = 2.0  # seconds of measured steps, after which no further step is measured


class StepResult(NamedTuple):
    """The result of one optimizer step: the mean loss, the losses of this process's samples, the
    gradient norm of each optimized part, whether the weights were updated, the images that could
    not be read, with the reasons, and the signal that has asked a process to stop, or 0.
    """

    loss: float
    losses: SampleLosses
    gradient_norms: list[float]
    applied: bool
    lost: Sequence[tuple[str, str]] = ()
    signal: int = 0


class Agreed(NamedTuple):
    """What all processes of a run know of a step: the mean loss of its batch, the number of the
    signal that has asked one of them to stop, or 0, and the images that could not be read.
    """

    loss: float
    signal: int
    lost: Sequence[tuple[str, str]]


PAUSE_RETRY_S = 30.0  # after which a pause whose checkpoint could not be written is tried again


class Paused(Exception):
    """Raised after a checkpoint was saved, when training is to end before its budget is spent."""


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
        engine: Engine | None = None,
    ) -> None:
        """Create the state and the order of the batches; nothing is trained or written yet.

        Args:
            saved_config: the configuration as plain data, saved in checkpoints with the task's
                facts.
            hooks: run in this order.
            writes_frozen: whether the frozen parameters are written beside the checkpoints; if
                not, checkpoints name their hash only.
            engine: how several processes share the network; by default each holds all of it.
        """
        self.hooks, self.world = tuple(hooks), current()
        self.engine = engine or Engine(self.world)
        self.device = next(task.model.parameters()).device
        self.config, self.task, self.dataset, self.directory, self.saved_config = (
            config,
            task,
            dataset,
            directory,
            saved_config,
        )
        self.state = TrainingState.new(
            task.model, task.optimized_parts, config.post_hoc_ema.profiles, self._place
        )
        self.plan = dataset.plan(seed=config.seed, batch_size=config.batch_size)
        self._new, self._has_other_data = True, False
        self._pauses_from = 0.0
        self.timetable = Timetable(self.state)
        self.saver = RunSaver(self, writes_frozen=writes_frozen)
        self.recent, self._whole = Recent(), True
        self._seconds: Callable[[], float] = lambda: self.state.counters.seconds
        # whether this process wants a checkpoint after the step, and whether any does
        self._asks_to_save = self._save_is_asked = False
        self._has_shapes = len(self.plan.members.kinds) > 1
        self._say: Callable[[str], None] = lambda line: None
        self._pauses: Callable[[], bool] = lambda: False
        self.uncompiled: Callable[[], AbstractContextManager[object]] = (
            nullcontext  # validation's batches would be compiled once more
        )

    def newest_checkpoint(self) -> tuple[checkpoint.Checkpoint, list[str]]:
        """Return the newest whole checkpoint, and warnings about damaged ones, which are set aside.

        The first process chooses it.
        """
        loaded: list[checkpoint.Checkpoint] = []

        def load() -> list[Any]:
            newest, warnings = checkpoint.load_newest(self.directory.checkpoints)
            loaded.append(newest)
            return [str(newest.path), warnings]

        path, warnings = self.world.on_first(load)
        return (loaded[0] if loaded else checkpoint.load(Path(path))), warnings

    def _place(self, model: nn.Module) -> None:
        network = self.task.compiled_part(model)
        self.engine.place(network, network.units())

    def resume(self, *, accepts_data: bool = False) -> list[str]:
        """Load the newest whole checkpoint, and return warnings about newer ones that are damaged.

        Args:
            accepts_data: whether the data may have changed; a new epoch of them then begins.
        Raises:
            CheckpointError: if there is none, or the data, the seed or the batch size have changed.
        """
        loaded, warnings = self.newest_checkpoint()
        changed = loaded.state.get("data") != self.fingerprint
        begins = loaded.step if accepts_data and changed else loaded.state.get("plan_begins", 0)
        version = plan_version(loaded)
        self.plan = replace(self.plan, begins=int(begins), version=version)
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
        if accepts_data and changed:
            counters.stopped = ""  # the verdict was one on other data
        self._has_other_data = changed
        self.world.on_first(
            partial(post_hoc_ema.forget, self.directory.averages, after=counters.step)
        )
        self._new = False
        return warnings

    @property
    def finished(self) -> bool:
        """Whether the budget is spent, or the run has stopped at a verdict."""
        return self.progress >= 1 or self.state.counters.stopped in STOP_AT[self.config.stop]

    @property
    def views(self) -> float:
        """Mean number of times that each training image was seen since the data last changed."""
        before = self.plan.begins * self.config.batch_size
        return max(0, self.state.counters.samples_seen - before) / self.plan.size

    @property
    def epochs(self) -> float:
        """Samples seen in the whole run, in epochs of the current data."""
        return self.state.counters.samples_seen / self.plan.size

    @cached_property
    def fingerprint(self) -> str:
        """The hash of the data that this run trains on."""
        return self.dataset.fingerprint

    @property
    def is_new(self) -> bool:
        """Whether nothing of the run was saved yet."""
        return self._new

    def run(self, *, pauses: Callable[[], bool] = lambda: False) -> bool:
        """Train to the end of the budget, or until `pauses` says so; return whether it is the end.

        Args:
            pauses: is called between two steps.
        Raises:
            Interrupted: after a signal, with a checkpoint saved.
            DivergedError: after too many non-finite steps in a row.
        """
        with (
            signals.handled(),
            signals.agreed_by(self.world.agreement),
            watching(self.config.stall_minutes) as guardian,
            ProgressBar("training") as bar,
        ):
            self._watched_by(guardian)
            self._say, self._pauses = bar.say, pauses
            self._prepare(bar)
            session = self._session(bar)
            try:
                self._loop(session)
            except Paused:
                return False
            except Interrupted as signal:
                self._stop(signal, bar)
                raise
            except BaseException as error:
                # between two steps nothing need be lost; of several processes, the others are elsewhere
                if isinstance(error, DataError) and self.world.size == 1:
                    self.saver.save_last(bar, STOP_WAITS_S)
                state = "unsaved" if isinstance(error, UnsavedError) else "failed"
                with suppress(OSError):  # the disk may be why
                    self.directory.write_status(state, self.state.counters.step, error=str(error))
                raise
            finally:
                guardian.forget()
                session.close()
                self.saver.finish(bar)
            self._tell_what_was_left_out(bar)
            with suppress(OSError):
                self.directory.write_status("finished", self.state.counters.step)
            return True

    def _tell_what_was_left_out(self, bar: ProgressBar) -> None:
        counters = self.state.counters
        if counters.updates < counters.step:
            bar.say(
                f"{counters.step - counters.updates} of {counters.step} steps changed nothing: "
                f"{counters.skipped} had a loss or gradient that is not finite, the others were "
                "passed over"
            )

    def _stop(self, signal: Interrupted, bar: ProgressBar) -> None:
        """Save, and say how to go on."""
        step = self.state.counters.step
        try:
            self.saver.save_last(bar, STOP_WAITS_S)
            done = f"saved at step {step}"
        except UnstableError as trouble:
            done = f"step {step} is not saved, since {trouble.what}"
        with suppress(OSError):  # the disk may be full since
            self.directory.write_status("interrupted", step, signal=str(signal))
        signal.is_said = True
        bar.say(f"{signal}: {done}; `sfumato resume {self.directory.root}` goes on from there")

    def _watched_by(self, guardian: Watchdog) -> None:
        """Have the watchdog save what is whole, and write its stacks into the run."""

        def save(message: str) -> None:
            step = self.state.counters.step
            self.directory.write_status("stalled", step, error=message)
            if (
                self._whole and self.world.size == 1
            ):  # the main thread waits for data, or for a hook
                self.saver.save_now()
            self.saver.wait_for_mirror()

        guardian.seconds = 60 * self.config.stall_minutes
        number = "" if self.directory.writes else f"-{self.world.rank}"
        guardian.file = self.directory.path / f"stacks{number}.txt"
        guardian.on_stall = save

    def _session(self, bar: ProgressBar) -> Session:
        sinks = self._sinks() if self.directory.writes else []
        unreadable = UnreadableImages(
            self.directory.path / "bad_samples.jsonl",
            after_step=self.state.counters.step,
            images=len(self.dataset.entries),
            writes=self.directory.writes,
        )
        return Session(bar=bar, sinks=sinks, unreadable=unreadable)

    def _sinks(self) -> list[Sink]:
        metrics = MetricsFile(self.directory.metrics, after_step=self.state.counters.step)
        name, folder = (
            str(self.saved_config.get("name", self.directory.path.name)),
            self.directory.path,
        )
        others = open_sinks(
            self.config.log.sinks, folder=folder, name=name, config=self.saved_config
        )
        return [metrics, *others]

    def _prepare(self, bar: ProgressBar) -> None:
        """Choose precision and compilation, check the disk, and save a first checkpoint if the run
        is new.
        """
        counters, network = self.state.counters, self._resolve_precision(bar.say)
        if not self.engine.in_step and resolve_compile(
            self.config, counters, network, images=self.plan.size, trial=self._trial, say=bar.say
        ):
            self.uncompiled = partial(torch.compiler.set_stance, "force_eager")
        self.directory.require_space(self.saver.disk_bytes())
        if self._new or self._has_other_data:  # a kill leaves a run that goes on with these data
            self.saver.save_now(replaces=self._has_other_data)
            self._has_other_data = False
        self.directory.write_status("running", counters.step)

    def measure_step(self, *, steps: int = 3) -> float:
        """Return the median seconds of a few real training steps, not compiled.

        The first step warms up; if it is long, it is the only one. The trainer cannot be used
        afterwards.
        """
        self._resolve_precision(lambda line: None)
        seconds: list[float] = []
        with closing(self._supply(0)) as supply:
            while len(seconds) <= steps and sum(seconds) < LONG_S:
                begun = time.perf_counter()
                self.train_step(next(supply))
                seconds.append(time.perf_counter() - begun)
        return statistics.median(seconds[1:] or seconds)

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
                self.saver.save_last(session.bar, LAST_WAITS_S)
                return
            except UnstableError as trouble:
                go_back(self, trouble, session)

    def _train(self, session: Session) -> None:
        start = self.state.counters.step
        supply = self._supply(start)
        try:
            self._train_on(supply, session)
        finally:
            supply.close()

    def _supply(self, start: int) -> Supply:
        return Supply(self.dataset, self.plan, start=start, say=self._say, world=self.world)

    def _train_on(self, supply: Supply, session: Session) -> None:
        counters, bar = self.state.counters, session.bar
        clock = Clock(counters.seconds, counters.step)
        bar.start_at(self.progress)
        self._seconds = clock.seconds
        signals.poll()
        while True:
            finished = self.finished
            if counters.step != counters.watched or finished:
                self._between_steps(session, finished)
            if finished:
                return
            if self._pauses() and not counters.skipped_in_a_row:
                self._try(bar, self._pause)
            waited = time.perf_counter()
            batch = next(supply)
            clock.wait(time.perf_counter() - waited)
            if counters.is_passed_over:
                self._pass_over()
                continue
            self._asks_to_save = self._checkpoint_is_wanted(bar)
            result = self.train_step(batch)
            session.unreadable.record(result.lost, counters.step - 1, bar)
            judge(self, result, bar)
            if counters.step % self.config.log.every_steps == 0 or counters.step == 1:
                self._log(result, clock, session)
            signals.obey(result.signal)

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

    def _pause(self) -> None:
        if time.monotonic() > self._pauses_from:
            self._pauses_from = time.monotonic() + PAUSE_RETRY_S  # if it cannot be saved
            self.saver.save_now()
            raise Paused

    def _pass_over(self) -> None:
        """Count a batch that is not trained on."""
        self.state.counters.step += 1
        self.state.counters.samples_seen += self.config.batch_size

    def image_names(self, step: int) -> list[str]:
        """Return the names of the images of a batch."""
        positions = self.dataset.epoch[self.plan.batch(step)]
        return [self.dataset.entries[position].name for position in positions]

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
                    # where one process alone has failed, the others are elsewhere
                    if self.world.size > 1 and not is_agreed(error):
                        raise
                    session.bar.say(f"warning: {hook.name} at step {counters.step} failed: {error}")
        counters.watched = counters.step
        due = self._save_is_asked or self.timetable.due("checkpoint", self.config.checkpoint)
        self._save_is_asked = False
        if due and not finished and not counters.skipped_in_a_row:
            with self.timetable.recording("checkpoint"):
                self.saver.save(session.bar)

    def _checkpoint_is_wanted(self, bar: ProgressBar) -> bool:
        """Return whether a signal asks for a checkpoint, or one that could not be written is due."""
        if asked := signals.take_save_request():
            bar.say(f"SIGUSR1: step {self.state.counters.step + 1} is saved; training goes on")
        return self.saver.has_failed(bar) or asked

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
        """Take one optimizer step on a global batch, of which each process holds a share.

        Gradients are summed over micro-batches and processes and clipped, then the weights and
        their averages are updated. A non-finite loss or gradient leaves weights, averages and the
        learning-rate schedule as they are.
        """
        self._whole = False
        state, config = self.state, self.config
        counters = state.counters
        with self.engine.summed([p for part in state.optimized_parts for p in part.parameters]):
            losses = self._backward_in_memory(batch, self._dtype)
        # The step's only wait for the device: whether the weights may move is decided here, on the
        # host.
        total, *norms = torch.stack(
            [losses.per_sample.sum(), *(part.clip() for part in state.optimized_parts)]
        ).tolist()
        told = self._agree(total, batch)
        loss = told.loss
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
        return StepResult(loss, losses, norms, applied, told.lost, told.signal)

    def _agree(self, total: float, batch: Batch) -> Agreed:
        """Tell the other processes what happened in this step, and hear what did in theirs."""
        lost = [(bad.name, bad.reason) for bad in batch.bad]
        rows = self.world.gather(
            [
                total,
                self._seconds(),
                self.timetable.cost_s,
                signals.received(),
                self._asks_to_save,
                lost,
            ]
        )
        totals, seconds, costs, numbers, asked, lists = zip(*rows, strict=True)
        self.state.counters.seconds, self.timetable.cost_s = seconds[0], costs[0]
        self._save_is_asked = any(asked)
        images = [(name, why) for images in lists for name, why in images]
        return Agreed(sum(totals) / batch.size, max(numbers), images)

    def _backward_in_memory(self, batch: Batch, dtype: torch.dtype) -> SampleLosses:
        """Run `_backward`, in smaller micro-batches where memory does not suffice.

        Gradients are the same up to rounding.
        """
        while True:
            try:
                return self._backward(batch, dtype)
            except (MemoryError, RuntimeError) as error:
                size = min(self._micro_batch, len(batch))
                # where all must pass through the network together, one cannot do so more often
                if not is_out_of_memory(error) or size == 1 or self.engine.in_step:
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
        size = self.config.effective_micro_batch
        return min(size, self.state.counters.micro_batch or size)

    def _backward(self, batch: Batch, dtype: torch.dtype) -> SampleLosses:
        """Accumulate the gradient of the batch's mean loss, and return the losses.

        The batch is split into groups of one shape, and these into micro-batches.
        """
        if not self.state.model.training:  # the walk through all modules takes its time
            self.state.model.train()
        progress, micro_batches = self.progress, []
        network = self.task.compiled_part(self.state.model)
        parts = self._micro_batches(batch)
        for number, (group, chosen, weight) in enumerate(parts):
            self.engine.expect(network, last=number == len(parts) - 1)
            losses = self.task.loss(
                self.state.model, batch, group, chosen, progress=progress, dtype=dtype
            )
            (losses.per_sample.sum() * (weight / batch.size)).backward()
            if weight:
                micro_batches.append(losses)
        notes = {
            name: torch.cat([losses.notes[name].detach() for losses in micro_batches])
            for name in micro_batches[0].notes
        }
        return SampleLosses(
            torch.cat([losses.per_sample.detach() for losses in micro_batches]), notes
        )

    def _micro_batches(self, batch: Batch) -> list[tuple[ShapeGroup, slice, float]]:
        """Return the micro-batches of a batch with their weights: groups of one shape, in slices.

        Where all processes must pass through the network equally often, those with fewer groups
        repeat their last one, with weight 0.
        """
        size = self._micro_batch
        parts = [
            (group, slice(begin, min(begin + size, len(group))), 1.0)
            for group in batch.groups
            for begin in range(0, len(group), size)
        ]
        if self.engine.in_step and self._has_shapes:
            most = max(self.world.gather(len(parts)))
            parts += [(*parts[-1][:2], 0.0)] * (most - len(parts))
        return parts

    def _trial(self) -> Callable[[torch.dtype], None]:
        """Return a function that runs one forward and backward pass, and changes nothing."""
        batch = next(self._supply(0))

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
            epochs=self.epochs,
            seconds=counters.seconds,
        )

    def _of_all(self, losses: SampleLosses) -> SampleLosses:
        """Return the losses of all processes' samples, on the CPU."""
        own = losses.on_host()
        named = {"": own.per_sample, **own.notes}
        rows = self.world.gather({name: value.tolist() for name, value in named.items()})
        if len(rows) == 1:
            return own
        whole = {name: torch.tensor([x for row in rows for x in row[name]]) for name in named}
        return SampleLosses(whole.pop(""), whole)

    def _record(self, result: StepResult, clock: Clock) -> dict[str, Any]:
        counters = self.state.counters
        images_per_s, wait_ms = clock.lap(self.config.batch_size, counters.step)
        return {
            "step": counters.step,
            "samples_seen": counters.samples_seen,
            "epoch": self.epochs,
            "time": counters.seconds,
            "train/loss": result.loss,
            **self.task.log_metrics(self._of_all(result.losses)),
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
