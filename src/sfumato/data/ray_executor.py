"""Decoding by the workers of a Ray cluster; needs the extra `ray`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to its authors

import ray
from ray.exceptions import RayTaskError, WorkerCrashedError

from sfumato.data.executors import POLL_S, RETRIES, WAITING, unreachable, workers_died
from sfumato.errors import SfumatoError
from sfumato.process.signals import raise_if_requested


def run(
    work: Callable[[Any], Any], tasks: Sequence[Any], address: str
) -> Iterator[tuple[int, Any]]:
    """Yield the number and the result of each task; see `executors.run_on_cluster`."""
    is_own = not ray.is_initialized()
    if is_own:
        _join(address)
    try:
        remote = ray.remote(max_retries=RETRIES)(_call)
        left, pending = iter(enumerate(tasks)), dict[Any, int]()
        while True:
            room = WAITING * max(1, int(ray.cluster_resources().get("CPU", 1))) - len(pending)
            for number, task in [each for _, each in zip(range(room), left, strict=False)]:
                pending[remote.remote(work, task)] = number
            if not pending:
                return
            done, _ = ray.wait(list(pending), num_returns=1, timeout=POLL_S)
            raise_if_requested()
            for reference in done:
                yield pending.pop(reference), _result(reference)
    finally:
        if is_own:
            ray.shutdown()


def _call(work: Callable[[Any], Any], task: Any) -> Any:
    return work(task)


def _join(address: str) -> None:
    try:
        ray.init(
            address=address or "local", include_dashboard=False, log_to_driver=False,
            logging_level=logging.WARNING,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:  # ConnectionError is an OSError
        raise unreachable("ray", address, error) from None


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except WorkerCrashedError:
        raise workers_died() from None
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, SfumatoError):
            raise cause from None
        raise
