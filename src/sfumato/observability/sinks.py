"""Sinks: where the metrics of a run go. metrics.jsonl always; TensorBoard, Weights & Biases and
trackio on request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from sfumato.errors import ConfigError

SinkName = Literal["tensorboard", "wandb", "trackio"]


class Sink(Protocol):
    """Takes records: plain data with a `step`."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def open_sinks(
    names: Sequence[SinkName], *, folder: Path, name: str, config: Mapping[str, Any]
) -> list[Sink]:
    """Open the sinks of a run besides metrics.jsonl.

    Args:
        folder: the run's; files go into a sub-folder of each sink's name.
        name: the run's.
        config: the run's configuration, which some sinks show.
    Raises:
        ConfigError: naming the extra that is not installed.
    """
    return [opened(folder, name, config) for opened in require_sinks(names)]


def require_sinks(
    names: Sequence[SinkName],
) -> list[Callable[[Path, str, Mapping[str, Any]], Sink]]:
    """What opens each sink.

    Raises:
        ConfigError: naming the extra that is not installed.
    """
    found = []
    for name in names:
        try:
            found.append(import_module(f"sfumato.observability.{name}_sink").open_sink)
        except ImportError:
            raise ConfigError(
                f"{name} is not installed",
                where="log.sinks",
                hint=f"pip install 'sfumato[{name}]', or leave it out",
            ) from None
    return found


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record, without its step; what is not a number is left out."""
    return {
        name: float(value)
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }
