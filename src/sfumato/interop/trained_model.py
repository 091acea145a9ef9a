"""What an export is written from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from sfumato.generation.pipeline import Pipeline
from sfumato.recipes.run import Run


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A run's model, ready to be exported.

    Attributes:
        pipeline: with the averaged weights, in float32 on the CPU; adapted layers are still apart.
        run: the run's configuration.
        directory: the run's directory.
        step: the step of the weights.
    """

    pipeline: Pipeline
    run: Run
    directory: Path
    step: int


# Writes a model to a path that does not exist yet, in the given precision; returns lines that say
# what was written, what was compared with the run, and what was lost. Raises before anything is
# written if the model cannot be written in this format.
Exporter = Callable[[TrainedModel, Path, torch.dtype], list[str]]
