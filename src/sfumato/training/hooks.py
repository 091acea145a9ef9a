"""Hooks: what a training run does between its steps, in this order, before a checkpoint is
saved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sfumato.errors import CheckpointError
from sfumato.observability.progress import ProgressBar
from sfumato.observability.sinks import Sink
from sfumato.training.signals import Interruption

if TYPE_CHECKING:
    from sfumato.training.trainer import Trainer

# steps whose averaged weights are kept for good
SNAPSHOTS = frozenset(2**power for power in range(8, 40))


@dataclass(frozen=True, kw_only=True)
class Session:
    """One call of `Trainer.run`.

    Attributes:
        sinks: that metrics are written to.
        interruption: raises Interrupted where a signal has asked the run to stop.
    """

    bar: ProgressBar
    sinks: Sequence[Sink]
    interruption: Interruption

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a record of metrics to every sink; one that fails is a warning."""
        for sink in self.sinks:
            try:
                sink.write(record)
            except OSError as error:
                self.bar.say(f"warning: {error}")


class Hook(ABC):
    """Something that is done when it is due.

    Attributes:
        name: in warnings, and under which the run notes when it was done last.
        tolerated: errors that are a warning, after which training goes on: a disk that is full for
            a while need not end a run.
    """

    name: ClassVar[str]
    tolerated: ClassVar[tuple[type[Exception], ...]] = (CheckpointError, OSError)

    @abstractmethod
    def due(self, trainer: Trainer, *, finished: bool) -> bool:
        """Whether it is time, after the step that the trainer has reached; `finished` says that it
        was the last one.
        """

    @abstractmethod
    def run(self, trainer: Trainer, session: Session) -> None:
        """Do it."""


class Preview(Hook):
    """Images of the averaged model, from the same noise every time."""

    name = "preview"
    tolerated = (OSError, ValueError, RuntimeError)

    def due(self, trainer: Trainer, *, finished: bool) -> bool:
        return (
            finished
            or trainer.state.counters.step == 0
            or trainer.timetable.due(self.name, trainer.config.preview)
        )

    def run(self, trainer: Trainer, session: Session) -> None:
        with trainer.timetable.doing(self.name):
            step = trainer.state.counters.step
            trainer.task.preview(
                trainer.state.average, step, lambda _: session.interruption.raise_if_requested()
            )


class Snapshot(Hook):
    """The averaged weights at powers of two, kept for good."""

    name = "snapshot"

    def due(self, trainer: Trainer, *, finished: bool) -> bool:
        return trainer.state.counters.step in SNAPSHOTS

    def run(self, trainer: Trainer, session: Session) -> None:
        trainer.save_snapshot()


class Averages(Hook):
    """Averages from which others are made after training."""

    name = "averages"

    def due(self, trainer: Trainer, *, finished: bool) -> bool:
        return True  # the trainer counts the parts of the budget

    def run(self, trainer: Trainer, session: Session) -> None:
        trainer.keep_averages()


class Validation(Hook):
    """Errors on held-out images. A validation that fails ends the run."""

    name = "validation"
    tolerated = ()

    def due(self, trainer: Trainer, *, finished: bool) -> bool:
        step = trainer.state.counters.step
        return step > 0 and (
            finished or trainer.timetable.due(self.name, trainer.config.validation)
        )

    def run(self, trainer: Trainer, session: Session) -> None:
        with trainer.timetable.doing(self.name):
            figures = trainer.validate()
        counters = trainer.state.counters
        session.write({"step": counters.step, "samples_seen": counters.samples_seen, **figures})
        session.bar.say(f"step {counters.step}: {trainer.task.summary(figures)}")


HOOKS: tuple[Hook, ...] = (Preview(), Snapshot(), Averages(), Validation())
