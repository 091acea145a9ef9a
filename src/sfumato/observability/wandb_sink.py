"""Metrics for Weights & Biases; needs the extra `wandb`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from sfumato.observability.sinks import scalars


class WandbSink:
    """A run of the wandb project `sfumato`, named after the run's folder; wandb's own settings
    (offline mode, keys) come from the environment.
    """

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        self._run = wandb.init(
            project="sfumato",
            name=folder.name,
            config={"recipe": name, **config},
            dir=str(folder),
            id=run_id(folder),
            resume="allow",
        )

    def write(self, record: Mapping[str, Any]) -> None:
        """Add one point to each curve."""
        wandb.log(scalars(record), step=int(record["step"]))

    def close(self) -> None:
        """Send what is left."""
        wandb.finish()


def run_id(folder: Path) -> str:
    """Return an identifier that is the same after a resume: a hash of the folder's full path."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]


def open_sink(folder: Path, name: str, config: Mapping[str, Any]) -> WandbSink:
    """Open the sink of a run; after a resume, the same run continues."""
    return WandbSink(folder, name, config)
