"""Metrics for trackio; needs the extra `trackio`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trackio

from sfumato.observability.sinks import scalars


class TrackioSink:
    """A run of the trackio project `sfumato`, named after the run's folder; trackio's own settings
    (offline mode, keys) come from the environment.
    """

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        self._run = trackio.init(
            project="sfumato", name=folder.name, config={"recipe": name, **config}, resume="allow"
        )

    def write(self, record: Mapping[str, Any]) -> None:
        """Add one point to each curve."""
        trackio.log(scalars(record), step=int(record["step"]))

    def close(self) -> None:
        """Send what is left."""
        trackio.finish()


def open_sink(folder: Path, name: str, config: Mapping[str, Any]) -> TrackioSink:
    """Open the sink of a run; after a resume, the same run continues."""
    return TrackioSink(folder, name, config)
