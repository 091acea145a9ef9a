"""The batches of a run in order, whatever happens to the processes that read ahead."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from sfumato.data import Batch, BatchPlan, Dataset, batches
from sfumato.data.shards_ahead import ShardsAhead
from sfumato.distributed import World
from sfumato.errors import DataError
from sfumato.process.signals import raise_if_requested

MAX_RESTARTS = 3  # of the processes that read ahead, within FORGIVEN batches
FORGIVEN = 1000
REAP_S = 0.05


class Supply:
    """An iterator of this process's share of the batches from a step on; readers that have died are
    started again.

    Batches are a function of their step, so that nothing is lost or repeated.
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: BatchPlan,
        *,
        start: int,
        say: Callable[[str], None],
        world: World,
    ) -> None:
        self._dataset, self._plan, self._say, self._world = dataset, plan, say, world
        self._step, self._restarts, self._last_restart = start, 0, start
        self._batches: Iterator[Batch] | None = None
        self._ahead = ShardsAhead(dataset, plan, say=say)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Return the next batch, and wait for it as long as it takes.

        Raises:
            Interrupted: if a signal has asked the process to stop.
            DataError: if the processes that read ahead die again and again.
        """
        while True:
            raise_if_requested()
            if self._batches is None:
                self._ahead.pause()
                self._batches = batches(
                    self._dataset,
                    self._plan,
                    start=self._step,
                    rank=self._world.rank,
                    ranks=self._world.size,
                )
            self._ahead.follow(self._step * self._plan.batch_size)
            try:
                batch = next(self._batches)
            except Exception as error:
                if str(error).startswith("DataLoader timed out after"):
                    continue
                if not self._has_lost_reader():
                    raise
                self._restart(error)
                continue
            self._step += 1
            return batch

    def _has_lost_reader(self) -> bool:
        """Return whether a process that reads ahead has ended, whatever error that led to here."""
        readers = getattr(self._batches, "_workers", ())
        if readers:
            time.sleep(REAP_S)  # until the system has noticed
        return any(not process.is_alive() for process in readers)

    def close(self) -> None:
        """End the processes that read ahead, also those that hang in a read."""
        self._close_readers()
        self._ahead.close()

    def _close_readers(self) -> None:
        readers = getattr(self._batches, "_workers", ())
        for process in readers:
            process.kill()
        if readers:
            # one that was killed may hold the lock of the event by which the iterator ends its readers,
            # and would wait for it for ever
            vars(self._batches)["_workers_done_event"] = threading.Event()
        self._batches = None

    def _restart(self, error: Exception) -> None:
        raise_if_requested()  # a signal to all processes of a run has ended those that read ahead, too
        if self._step - self._last_restart > FORGIVEN:
            self._restarts = 0
        self._restarts, self._last_restart = self._restarts + 1, self._step
        if self._restarts > MAX_RESTARTS:
            raise DataError(
                f"processes that read data ahead ended {self._restarts} times: {error}",
                where=f"step {self._step}",
                hint="they may lack memory: lower data.workers, or batch_size; `sfumato resume` "
                "goes on",
            )
        self._close_readers()
        self._say(
            f"warning: a process that reads data ahead has ended ({error}); all of them are "
            f"started again at step {self._step}"
        )
