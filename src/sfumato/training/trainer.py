"""The training loop."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sfumato.data import Batch, BatchPlan, Dataset, batches
from sfumato.data.dataset_diff import changes
from sfumato.errors import CheckpointError, DataError, DivergedError
from sfumato.nn.accelerable import Accelerable
from sfumato.observability.metrics_file import MetricsFile, peak_gib
from sfumato.observability.progress import Clock, ProgressBar, short
from sfumato.observability.sinks import open_sinks
from sfumato.storage import checkpoint
from sfumato.storage.base_parts import PARTS, require_same_parts
from sfumato.storage.run_directory import RunDirectory
from sfumato.training import ema, post_hoc_ema
from sfumato.training.autotune import precision_of, resolve_compile, resolve_precision
from sfumato.training.config import TrainingConfig
from sfumato.training.hooks import HOOKS, SNAPSHOTS, Hook, Session
from sfumato.training.parameters import count, trainable
from sfumato.training.precision import DTYPES
from sfumato.training.signals import Interrupted, Interruption
from sfumato.training.state import TrainingState, average_name
from sfumato.training.stopping import STOP_AT
from sfumato.training.tasks.protocol import SampleLosses, Task
from sfumato.training.timetable import Timetable

SKIPS_IN_A_ROW = 20
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
        self.uncompiled: Callable[[], AbstractContextManager[object]] = (
            nullcontext  # validation's batches would be compiled once more
        )

    def resume(self) -> list[str]:
        """Load the newest whole checkpoint, and return warnings about newer ones that are damaged.

        Raises:
            CheckpointError: if there is none, or the data, the seed or the batch size have changed.
        """
        checkpoint.sweep(self.directory.checkpoints)
        loaded, warnings = checkpoint.load_newest(self.directory.checkpoints)
        if loaded.state["data"] != self.dataset.fingerprint:
            before = self.directory.data_record()
            data_changes = (
                changes(before, self.dataset)
                if before.get("fingerprint") == loaded.state["data"]
                else []
            )
            raise CheckpointError(
                "the data are not what this run was trained on: "
                + (
                    "; ".join(data_changes)
                    or "images, their order, captions, categories, the split or the pixel format "
                    "changed"
                ),
                where=str(loaded.path),
                hint="restore them as they were, or train a new run on them as they are",
            )
        if loaded.state["plan"] != self.plan.hash:
            raise CheckpointError(
                "seed or batch_size are not what this run began with, so that samples would be "
                "repeated or left out",
                where=str(loaded.path),
                hint="leave them as they are in config.yaml; micro_batch may change",
            )
        before, now = (facts.get("prior_images", "") for facts in (loaded.state, self.task.facts))
        if before != now:
            raise CheckpointError(
                "the prior images of preservation are not those that this run began with: their "
                f"hash is {str(now)[:12] or 'empty'}, and was {str(before)[:12] or 'empty'}",
                where=str(loaded.path),
                hint="leave preservation and its images as they were, or train a new run",
            )
        checkpoint.require_frozen(loaded, self.state.frozen_tensors())
        warnings += require_same_parts(
            loaded.state.get(PARTS, {}), self.task.facts.get(PARTS, {}), where=str(loaded.path)
        )
        self.state.restore(loaded.tensors, loaded.state["counters"])
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
        counters = self.state.counters
        with Interruption() as interruption, ProgressBar("training") as bar:
            self._prepare(bar)
            session, self._began = self._session(bar, interruption), counters.step
            try:
                self._loop(session)
            except Interrupted as signal:
                self._save()
                self.directory.write_status("interrupted", counters.step, signal=str(signal))
                bar.say(
                    f"{signal}: saved at step {counters.step}; `sfumato resume "
                    f"{self.directory.root}` goes on from there"
                )
                raise
            except BaseException as error:
                with suppress(OSError):  # the disk may be why
                    self.directory.write_status("failed", counters.step, error=str(error))
                raise
            finally:
                for sink in (*session.sinks, *([] if self._bad is None else [self._bad])):
                    with suppress(OSError):
                        sink.close()
                self._bad = None
            self.directory.write_status("finished", counters.step)

    def _session(self, bar: ProgressBar, interruption: Interruption) -> Session:
        metrics = MetricsFile(self.directory.metrics, after_step=self.state.counters.step)
        name, folder = (
            str(self.saved_config.get("name", self.directory.path.name)),
            self.directory.path,
        )
        others = open_sinks(
            self.config.log.sinks, folder=folder, name=name, config=self.saved_config
        )
        return Session(bar=bar, sinks=[metrics, *others], interruption=interruption)

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
            self._save()
        self.directory.write_status("running", counters.step)

    def measure_step(self, *, steps: int = 3) -> float:
        """Return the median seconds of a few real training steps, not compiled.

        The first step warms up; if it is long, it is the only one. The trainer cannot be used
        afterwards.
        """
        self._resolve_precision(lambda line: None)
        supply = batches(self.dataset, self.plan, start=0)
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
        counters, bar = self.state.counters, session.bar
        clock = Clock(counters.seconds, counters.step)
        supply = batches(self.dataset, self.plan, start=counters.step)
        bar.start_at(self.progress)
        while True:
            session.interruption.raise_if_requested()
            finished = self.finished
            if counters.step != counters.watched or finished:
                self._between_steps(session, finished)
            if finished:
                return
            waited = time.perf_counter()
            batch = self._next(supply, session.interruption)
            clock.wait(time.perf_counter() - waited)
            self._record_unreadable(batch, bar)
            result = self.train_step(batch)
            counters.seconds = clock.seconds()
            if counters.step % self.config.log.every_steps == 0 or counters.step == 1:
                record = self._record(result, clock)
                session.write(record)
                speed = f"{record['perf/images_per_s']:.0f} images/s"
                figures = f"loss {short(result.loss)}  lr {record['train/lr']:.1e}  |g| {result.gradient_norms[0]:.2f}  {speed}"
                bar.update(
                    min(self.progress, 1.0),
                    f"step {counters.step}  {figures}  {record['memory/peak_gib']:.1f} GiB",
                )
                self._try(bar, partial(self.directory.heartbeat, counters.step))

    def _next(self, supply: Iterator[Batch], interruption: Interruption) -> Batch:
        """Return the next batch.

        The signal that asks this process to stop may also have ended the processes that read ahead;
        then Interrupted is raised instead of their error.
        """
        try:
            return next(supply)
        except RuntimeError:
            interruption.raise_if_requested()
            raise

    def _between_steps(self, session: Session, finished: bool) -> None:
        """Run the hooks that are due at this step, then save a checkpoint if one is due.

        The checkpoint comes last and records that the hooks were run, so that a run resumed from it
        does not repeat them.
        """
        counters = self.state.counters
        for hook in self.hooks:
            if hook.due(self, finished=finished):
                try:
                    hook.run(self, session)
                except hook.tolerated as error:
                    session.bar.say(f"warning: {hook.name} at step {counters.step} failed: {error}")
        counters.watched = counters.step
        if finished or self.timetable.due("checkpoint", self.config.checkpoint):
            with self.timetable.recording("checkpoint"):
                self._try(session.bar, self._save)

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

        Raises:
            DivergedError: after SKIPS_IN_A_ROW such steps in a row.
        """
        state, config = self.state, self.config
        counters = state.counters
        losses = self._backward(batch, self._dtype)
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
            counters.skipped += 1
            counters.skipped_in_a_row += 1
        self._zero_grad()
        counters.step += 1
        counters.samples_seen += config.batch_size
        if counters.skipped_in_a_row >= SKIPS_IN_A_ROW:
            self._give_up()
        return StepResult(loss, losses, norms, applied)

    def _give_up(self) -> None:
        """Raise DivergedError, after setting aside all checkpoints after the newest sound one.

        A checkpoint is sound if its loss is not far above the least loss of the run. `sfumato
        resume` begins at the newest sound one.
        """
        sound = checkpoint.set_diverged_aside(self.directory.checkpoints)
        start = (
            ""
            if sound is None
            else f"; `sfumato resume {self.directory.root}` begins at step {sound}, before the "
            "loss rose"
        )
        raise DivergedError(
            f"{SKIPS_IN_A_ROW} steps in a row had a non-finite loss or gradient",
            where=f"step {self.state.counters.step}",
            hint=f"lower optimizer.learning_rate, or set precision=float32{start}",
        )

    def _backward(self, batch: Batch, dtype: torch.dtype) -> SampleLosses:
        """Accumulate the gradient of the batch's mean loss, and return the losses.

        The batch is split into groups of one shape, and these into micro-batches.
        """
        if not self.state.model.training:  # the walk through all modules takes its time
            self.state.model.train()
        size, progress = self.config.effective_micro_batch, self.progress
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
        batch = next(batches(self.dataset, self.plan, start=0))

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

    def _save(self) -> Path:
        self._frozen = self._frozen or self._save_frozen()
        return checkpoint.save(
            self.directory.checkpoints,
            step=self.state.counters.step,
            state={
                "counters": asdict(self.state.counters),
                "data": self.dataset.fingerprint,
                **self.task.facts,
                "plan": self.plan.hash,
                "frozen": self._frozen,
                "frozen_storage": checkpoint.storage_of(self.state.frozen_tensors()),
                "config": self.saved_config,
            },
            tensors=self.state.tensors(),
            keep=self.config.checkpoint.keep,
            sound=self.state.counters.sound,
        )

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
