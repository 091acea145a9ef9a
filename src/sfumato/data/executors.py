"""Executors that decode the parts of a source on several machines: clusters of Dask and of Ray."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

from sfumato.errors import ConfigError, DataError

Task = TypeVar("Task")
Result = TypeVar("Result")
Cluster = Literal["dask", "ray"]
PACKAGES: dict[Cluster, str] = {"dask": "distributed", "ray": "ray"}
WAITING = 4  # tasks that each worker has, or that wait for it: their images are listed in memory
POLL_S = 0.5  # of waiting, after which signals are looked at
RETRIES = 3  # of a task whose worker has died


def run_on_cluster(
    cluster: Cluster, work: Callable[[Task], Result], tasks: Sequence[Task], *, address: str = ""
) -> Iterator[tuple[int, Result]]:
    """Yield the number and the result of each task, in the order in which workers of a cluster end
    them. A task whose worker dies is given to another one.

    Args:
        address: of the cluster; "" starts one on this machine, with a worker for each core.
    Raises:
        ConfigError: if the package is missing, or the cluster cannot be reached.
        DataError: if workers die again and again.
    """
    try:
        module = importlib.import_module(f"sfumato.data.{cluster}_executor")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != PACKAGES[cluster]:
            raise
        raise ConfigError(
            f"needs the package {PACKAGES[cluster]}",
            where=f"--engine {cluster}",
            hint=f"pip install 'sfumato[{cluster}]', on all machines of the cluster",
        ) from None
    run: Callable[..., Iterator[tuple[int, Any]]] = module.run
    return run(work, tasks, address)


def unreachable(cluster: Cluster, address: str, error: Exception) -> ConfigError:
    """Return the error of a cluster that cannot be reached or started."""
    reason = str(error).splitlines() or [type(error).__name__]
    return ConfigError(
        f"cannot be reached: {reason[0][:200]}" if address else f"cannot be started: {reason[0][:200]}",
        where=f"--engine {cluster}" + (f" --address {address}" if address else ""),
        hint="check the address, and that the cluster runs; without one, a cluster is started on this "
        "machine",
    )  # fmt: skip


def workers_died() -> DataError:
    """Return the error of a part whose workers have died again and again."""
    return DataError(
        f"workers that read images have died {RETRIES + 1} times at the same part",
        where="data",
        hint="see whether their memory is short; what was decoded so far is kept",
    )
