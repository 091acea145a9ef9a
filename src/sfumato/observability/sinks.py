"""Sinks: where the metrics of a run go. metrics.jsonl is always written; TensorBoard, Weights &
Biases and trackio are written on request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from sfumato.errors import ConfigError

SinkName = Literal["tensorboard", "wandb", "trackio"]


class Sink(Protocol):
    """A destination for records, which are plain data with a `step`."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Add the numbers of `record` at its `step`."""
        ...

    def close(self) -> None:
        """Write or send what is left, and close."""
        ...


def open_sinks(
    names: Sequence[SinkName], *, folder: Path, name: str, config: Mapping[str, Any]
) -> list[Sink]:
    """Open the sinks of a run other than metrics.jsonl.

    Args:
        folder: the run's folder; TensorBoard and Weights & Biases write to a sub-folder of it. The
            last two sinks call the run by this folder's name.
        name: the recipe's name, which these sinks show.
        config: the run's configuration, which these sinks show.
    Raises:
        ConfigError: naming the extra that is not installed.
    """
    return [opened(folder, name, config) for opened in require_sinks(names)]


def require_sinks(
    names: Sequence[SinkName],
) -> list[Callable[[Path, str, Mapping[str, Any]], Sink]]:
    """Return the function that opens each sink, by importing its module.

    Raises:
        ConfigError: naming the extra that is not installed.
    """
    openers = []
    for name in names:
        try:
            openers.append(import_module(f"sfumato.observability.{name}_sink").open_sink)
        except ImportError:
            raise ConfigError(
                f"{name} is not installed",
                where="log.sinks",
                hint=f"pip install 'sfumato[{name}]', or leave it out",
            ) from None
    return openers


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a record by name, without its step; other values are left out."""
    return {
        name: float(value)
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }
