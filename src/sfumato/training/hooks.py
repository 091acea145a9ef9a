"""Hooks: what a training run does between steps, in this order, before it saves a checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sfumato.errors import CheckpointError
from sfumato.observability.metrics_file import MetricsFile
from sfumato.observability.progress import ProgressBar
from sfumato.observability.sinks import Sink
from sfumato.process.signals import poll
from sfumato.training.unreadable import UnreadableImages

if TYPE_CHECKING:
    from sfumato.training.trainer import Trainer

# steps whose averaged weights are saved and never removed
SNAPSHOTS = frozenset(2**power for power in range(8, 40))


@dataclass(frozen=True, kw_only=True)
class Session:
    """One call of `Trainer.run`.

    Attributes:
        sinks: that metrics are written to.
        unreadable: the list of images that could not be read.
    """

    bar: ProgressBar
    sinks: Sequence[Sink]
    unreadable: UnreadableImages

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a record of metrics to every sink; one that fails only causes a warning."""
        for sink in self.sinks:
            try:
                sink.write(record)
            except OSError as error:
                self.bar.say(f"warning: {error}")

    def go_back(self, step: int) -> None:
        """Drop the records of steps that are trained again from the files that can forget them."""
        for sink in self.sinks:
            if isinstance(sink, MetricsFile):
                with suppress(OSError):  # later lines of the same steps follow
                    sink.drop_after(step)
        self.unreadable.go_back(step)

    def close(self) -> None:
        """Close all sinks."""
        for sink in self.sinks:
            with suppress(OSError):
                sink.close()
        self.unreadable.close()


class Hook(ABC):
    """An action that is run between training steps when it is due.

    Attributes:
        name: the name in warnings, and under which the run records when it was last done.
        tolerated: errors that only cause a warning, after which training goes on: a disk that is
            full for a while need not end a run.
    """

    name: ClassVar[str]
    tolerated: ClassVar[tuple[type[Exception], ...]] = (CheckpointError, OSError)

    @abstractmethod
    def due(self, trainer: Trainer, *, finished: bool) -> bool:
        """Return whether to run after the step that the trainer has reached.

        `finished` says that it was the last one.
        """

    @abstractmethod
    def run(self, trainer: Trainer, session: Session) -> None:
        """Perform the action."""

    def go_back(self, trainer: Trainer) -> None:  # noqa: B027 most hooks keep nothing
        """Forget what was done after the step that training has gone back to."""


class Preview(Hook):
    """Images from the averaged model, with the same noise every time."""

    name = "preview"
    tolerated = (OSError, ValueError, RuntimeError)

    def due(self, trainer: Trainer, *, finished: bool) -> bool:
        """Return True at step 0, after the last step, and when the timetable says so."""
        return (
            finished
            or trainer.state.counters.step == 0
            or trainer.timetable.due(self.name, trainer.config.preview)
        )

    def run(self, trainer: Trainer, session: Session) -> None:
        """Write a preview of the averaged model; a signal is raised between its denoising steps."""
        with trainer.timetable.recording(self.name):
            step = trainer.state.counters.step
            trainer.task.preview(trainer.state.average, step, lambda _: poll())


class Snapshot(Hook):
    """Snapshots of the averaged weights at powers of two, which are never removed."""

    name = "snapshot"

    def due(self, trainer: Trainer, *, finished: bool) -> bool:
        """Return whether the step is a power of two, from 256 on."""
        return trainer.state.counters.step in SNAPSHOTS

    def run(self, trainer: Trainer, session: Session) -> None:
        """Save the averaged weights of this step."""
        trainer.saver.save_snapshot()


class SaveAverages(Hook):
    """The averages from which others are reconstructed after training."""

    name = "averages"

    def due(self, trainer: Trainer, *, finished: bool) -> bool:
        """Return True; the trainer decides by its progress through the budget."""
        return True

    def run(self, trainer: Trainer, session: Session) -> None:
        """Save the tracked averages if the next part of the budget is over."""
        trainer.saver.save_averages()


class Validation(Hook):
    """Errors on held-out images. A validation that fails ends the run."""

    name = "validation"
    tolerated = ()

    def due(self, trainer: Trainer, *, finished: bool) -> bool:
        """Return True after the last step, and when the timetable says so, but not at step 0, and
        never if nothing is held out.
        """
        step = trainer.state.counters.step
        return (
            step > 0
            and len(trainer.dataset.holdout) > 0
            and (finished or trainer.timetable.due(self.name, trainer.config.validation))
        )

    def run(self, trainer: Trainer, session: Session) -> None:
        """Validate, write the figures to the sinks, and print their summary."""
        with trainer.timetable.recording(self.name):
            figures = trainer.validate()
        counters = trainer.state.counters
        session.write({"step": counters.step, "samples_seen": counters.samples_seen, **figures})
        session.bar.say(f"step {counters.step}: {trainer.task.summary(figures)}")


HOOKS: tuple[Hook, ...] = (Preview(), Snapshot(), SaveAverages(), Validation())
