"""When a training run was last saved, previewed and validated, and how long that took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from sfumato.training.config import Cadence
from sfumato.training.state import TrainingState


class Timetable:
    """When the actions of a run are due by its training time.

    The time at which an action was last run is part of the run and saved in checkpoints. The
    duration of an action depends on the machine and is not saved.

    Attributes:
        cost_s: the seconds that each action took when it was last run; of several processes, the
            first one's count.
    """

    def __init__(self, state: TrainingState) -> None:
        self._state, self.cost_s = state, dict[str, float]()

    def due(self, name: str, cadence: Cadence) -> bool:
        """Return whether it is time, at the step and second that the run has reached."""
        counters = self._state.counters
        last_s, cost_s = counters.done_s.get(name, 0.0), self.cost_s.get(name, 0.0)
        return cadence.due(
            step=counters.step, seconds=counters.seconds, last_s=last_s, cost_s=cost_s
        )

    @contextmanager
    def recording(self, name: str) -> Iterator[None]:
        """Record that an action is run now, and measure its duration.

        The time is recorded before the action, so that a checkpoint holds the time of its own
        saving.
        """
        self._state.counters.done_s[name] = self._state.counters.seconds
        begun = time.perf_counter()
        yield
        self.cost_s[name] = time.perf_counter() - begun
