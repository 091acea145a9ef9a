"""When a training has left its course: steps that are not finite, and a loss that has jumped.

Such a training goes back to the newest checkpoint from before the trouble, and passes over the
batches that it met it with.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from sfumato.distributed.sharding import whole
from sfumato.errors import DivergedError
from sfumato.observability.metrics_file import finite_or_null
from sfumato.observability.progress import ProgressBar, short
from sfumato.storage import checkpoint
from sfumato.storage.atomic import write_text
from sfumato.training import post_hoc_ema

if TYPE_CHECKING:
    from pathlib import Path

    from sfumato.training.hooks import Session
    from sfumato.training.trainer import StepResult, Trainer

SKIPS_IN_A_ROW = 20  # steps without an update, after which training goes back
SERIOUS = (
    5  # steps without an update in a row, from which checkpoints are not good ones for a while
)
MAX_ROLLBACKS = 3  # one after another, after which the run ends
# The moving average of the loss has jumped if it exceeds its median by this factor, and by as many of
# its deviations (1.48 x median absolute deviation, of the logarithm), so that a loss that varies
# widely from batch to batch is not taken for one. The newest averages are not part of the median.
JUMP_FACTOR, JUMP_DEVIATIONS, NEWEST = 10.0, 8.0, 10
HISTORY = 256  # averages that the median is of
WINDOW = 20  # steps before a jump that are passed over
SETTLED = 200  # updates after the last trouble until a checkpoint counts as good
FORGIVEN = 1000  # updates after which earlier returns do not count any more
NAMED = 3  # images of a skipped step that a message names


class UnstableError(DivergedError):
    """A training that must go back; `first` is the first step of the trouble."""

    def __init__(self, what: str, *, first: int, step: int) -> None:
        self.first = first
        super().__init__(
            what,
            where=f"step {step}",
            hint="lower optimizer.learning_rate, or set precision=float32",
        )


def has_jumped(averages: Sequence[float]) -> bool:
    """Return whether the newest of the moving averages of a loss is far above the earlier ones.

    Losses that are not positive have no logarithm, and are never said to jump.
    """
    before, now = averages[:-NEWEST], averages[-1] if averages else 0.0
    least = min(before, default=0.0)
    if least <= 0 or now <= JUMP_FACTOR * least:  # nor can it exceed the median by as much
        return False
    logs = [math.log(value) for value in before]
    middle = statistics.median_low(logs)
    spread = 1.4826 * statistics.median(abs(value - middle) for value in logs)
    return math.log(now) - middle > max(math.log(JUMP_FACTOR), JUMP_DEVIATIONS * spread)


@dataclass
class Incident:
    """What is known of a trouble, for a person to read.

    Attributes:
        reason: in one sentence.
        first, last: steps whose batches are passed over from now on, the first and the last one.
        resumed_from: step of the checkpoint that training went back to; None if it ended.
    """

    reason: str
    first: int
    last: int
    resumed_from: int | None
    steps: list[dict[str, Any]] = field(default_factory=list)

    def write(self, trainer: Trainer) -> Path:
        """Write the incident to the run's folder `incidents`; return the file."""
        counters = trainer.state.counters
        folder = trainer.directory.path / "incidents"
        file = folder / f"step-{counters.step:09d}.json"
        content = {
            "reason": self.reason,
            "first_step": self.first,
            "last_step": self.last,
            "resumed_from_step": self.resumed_from,
            "seed": trainer.config.seed,
            "batch_size": trainer.config.batch_size,
            "learning_rate": trainer.state.optimized_parts[0].rate,
            "precision": counters.precision,
            "weight_norms": weight_norms(trainer),
            "steps": [
                {**row, "images": trainer.image_names(row["step"])}
                for row in self.steps
                if self.first <= row["step"] <= self.last
            ],
        }
        if trainer.directory.writes:
            folder.mkdir(exist_ok=True)
            write_text(file, json.dumps(finite_or_null(content), indent=1, ensure_ascii=False))
        return file


def weight_norms(trainer: Trainer) -> dict[str, float]:
    """Return the norm of the weights of each block of the model: of names alike up to the second
    dot.
    """
    squares: dict[str, float] = {}
    for name, parameter in trainer.state.model.named_parameters():
        block = ".".join(name.split(".")[:3])
        squares[block] = squares.get(block, 0.0) + float(
            whole(parameter.detach().double().square().sum())
        )
    return {block: math.sqrt(square) for block, square in squares.items()}


class Recent:
    """The losses and gradient norms of the newest steps."""

    def __init__(self) -> None:
        self._rows: deque[dict[str, Any]] = deque(maxlen=2 * (SKIPS_IN_A_ROW + WINDOW))

    def add(self, step: int, loss: float, norms: Sequence[float], *, applied: bool) -> None:
        """Remember a step."""
        self._rows.append(
            {"step": step, "loss": loss, "gradient_norms": list(norms), "applied": applied}
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return the steps, oldest first."""
        return list(self._rows)


def judge(trainer: Trainer, result: StepResult, bar: ProgressBar) -> None:
    """Say which step was skipped, and whether training has left its course.

    Raises:
        UnstableError: if too many were in a row, or the loss has jumped.
    """
    counters = trainer.state.counters
    step = counters.step - 1  # whose batch it was
    trainer.recent.add(step, result.loss, result.gradient_norms, applied=result.applied)
    if not result.applied and counters.skipped <= NAMED:
        names = trainer.image_names(step)
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


def go_back(trainer: Trainer, trouble: UnstableError, session: Session) -> None:
    """Load the newest checkpoint from before the trouble; its batches are then passed over.

    Raises:
        DivergedError: if there is none, or training has gone back too often.
    """
    counters, directory = trainer.state.counters, trainer.directory
    trainer.saver.wait()
    sound = trainer.world.on_first(partial(checkpoint.set_diverged_aside, directory.checkpoints))
    gives_up = sound is None or counters.rollbacks >= MAX_ROLLBACKS
    first, last = max(trouble.first, sound or 0), counters.step - 1
    incident = Incident(
        reason=trouble.what,
        first=first,
        last=last,
        resumed_from=None if gives_up else sound,
        steps=trainer.recent.rows(),
    )
    try:
        file = str(incident.write(trainer))
    except OSError as error:  # the disk may be full
        file = f"not written: {error}"
    if gives_up:
        raise _given_up(trainer, trouble, sound, file)
    loaded, warnings = trainer.newest_checkpoint()
    for line in warnings:
        session.bar.say(f"warning: {line}")
    trainer.state.restore(loaded.tensors, loaded.counters)
    trainer.state.counters.record_rollback(counters, first, last)
    trainer.world.on_first(
        partial(post_hoc_ema.forget, directory.averages, after=trainer.state.counters.step)
    )
    for hook in trainer.hooks:
        hook.go_back(trainer)
    session.go_back(trainer.state.counters.step)
    session.bar.say(
        f"warning: {trouble.what} at {trouble.where}: training goes back to step {loaded.step}, and "
        f"the batches of steps {first} to {last} are passed over; what is known of them: {file}"
    )


def _given_up(
    trainer: Trainer, trouble: UnstableError, sound: int | None, file: str
) -> DivergedError:
    start = (
        ""
        if sound is None
        else f"; `sfumato resume {trainer.directory.root}` begins at step {sound}, before the "
        "loss rose"
    )
    again = trainer.state.counters.rollbacks
    return DivergedError(
        trouble.what + (f", after going back {again} times" if again else ""),
        where=f"{trouble.where}; what is known of it: {file}",
        hint=f"{trouble.hint}{start}",
    )
