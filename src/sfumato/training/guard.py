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
from typing import TYPE_CHECKING, Any

from sfumato.errors import DivergedError
from sfumato.observability.metrics_file import finite_or_null
from sfumato.storage.atomic import write_text

if TYPE_CHECKING:
    from pathlib import Path

    from sfumato.training.trainer import Trainer

SKIPS_IN_A_ROW = 20  # steps without an update, after which training goes back
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
    if not before or now <= 0 or min(before) <= 0:
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
        folder.mkdir(exist_ok=True)
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
        write_text(file, json.dumps(finite_or_null(content), indent=1, ensure_ascii=False))
        return file


def weight_norms(trainer: Trainer) -> dict[str, float]:
    """Return the norm of the weights of each block of the model: of names alike up to the second
    dot.
    """
    squares: dict[str, float] = {}
    for name, parameter in trainer.state.model.named_parameters():
        block = ".".join(name.split(".")[:3])
        squares[block] = squares.get(block, 0.0) + float(parameter.detach().double().square().sum())
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
