"""Metrics for TensorBoard; needs the extra `tensorboard`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorboard  # noqa: F401  (torch's writer needs it, and says so less clearly)
from torch.utils.tensorboard import SummaryWriter

from sfumato.observability.sinks import scalars


class TensorBoardSink:
    """Event files in the run's folder `tensorboard`; steps that are trained again after a resume
    replace the earlier ones.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._writer: Any = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Add one point to each curve."""
        step = int(record["step"])
        if self._writer is None:
            self._writer = SummaryWriter(self._folder, purge_step=step)
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


def open_sink(folder: Path, name: str, config: Mapping[str, Any]) -> TensorBoardSink:
    """Open the sink of a run; `name` and `config` are not shown."""
    return TensorBoardSink(folder / "tensorboard")
