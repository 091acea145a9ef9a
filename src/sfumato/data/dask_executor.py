"""Decoding by the workers of a Dask cluster; needs the extra `dask`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from os import cpu_count
from typing import Any

import distributed
from distributed.scheduler import KilledWorker

from sfumato.data.executors import POLL_S, RETRIES, WAITING, unreachable, workers_died
from sfumato.process.signals import raise_if_requested

CONNECT_S = 30.0


def run(
    work: Callable[[Any], Any], tasks: Sequence[Any], address: str
) -> Iterator[tuple[int, Any]]:
    """Yield the number and the result of each task; see `executors.run_on_cluster`."""
    with ExitStack() as stack:
        client = _client(address, stack)
        left, pending = iter(enumerate(tasks)), dict[Any, int]()
        while True:
            room = WAITING * max(1, sum(client.nthreads().values())) - len(pending)
            for number, task in [each for _, each in zip(range(room), left, strict=False)]:
                # two parts may be equal, and are two tasks all the same
                pending[client.submit(work, task, pure=False, retries=RETRIES)] = number
            if not pending:
                return
            for future in _ended(list(pending)):
                yield pending.pop(future), _result(future)


def _client(address: str, stack: ExitStack) -> Any:
    """Join a cluster, or start one on this machine, until `stack` is closed."""
    try:
        cluster = address or stack.enter_context(
            distributed.LocalCluster(
                n_workers=cpu_count(), threads_per_worker=1, dashboard_address=None
            )
        )
        return stack.enter_context(distributed.Client(cluster, timeout=CONNECT_S))
    except (OSError, TimeoutError, ValueError, RuntimeError) as error:
        raise unreachable("dask", address, error) from None


def _ended(futures: Sequence[Any]) -> list[Any]:
    """Wait until a task has ended, and for signals."""
    while True:
        try:
            done = distributed.wait(futures, timeout=POLL_S, return_when="FIRST_COMPLETED").done
        except TimeoutError:
            raise_if_requested()
            continue
        return list(done)


def _result(future: Any) -> Any:
    try:
        return future.result()
    except KilledWorker:
        raise workers_died() from None
