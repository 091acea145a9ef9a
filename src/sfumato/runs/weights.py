"""Which weights of a run are used."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sfumato.errors import CheckpointError, ConfigError
from sfumato.observability.progress import console
from sfumato.storage import checkpoint
from sfumato.storage.run_directory import RunDirectory
from sfumato.training import post_hoc_ema
from sfumato.training.best_weights import Recommendation

Weights = Literal["auto", "best", "ema", "raw"] | float
WEIGHT_FILES = {"ema": "ema", "raw": "model"}  # weights -> the file of a checkpoint


def chosen_weights(
    weights: Weights, loaded: checkpoint.Checkpoint, directory: RunDirectory
) -> dict[str, Tensor]:
    """Return the trained parameters; "auto" says so where they are not those of the last step."""
    advice = Recommendation.read(directory.verdict)
    if weights == "auto":
        weights = "best" if advice.use_best else "ema"
    if weights == "best":
        if advice.best_step is None:
            raise CheckpointError(
                "has no best weights: it was never compared on held-out images",
                where=str(directory.path),
                hint="use ema or raw",
            )
        if advice.stop:
            console().print(f"weights of step {advice.best_step}: {advice.sentence}", markup=False)
        return checkpoint.load_snapshot(directory.best, step=advice.best_step)
    if isinstance(weights, float):
        return post_hoc_ema.reconstruct(directory.averages, width=weights)
    if weights not in WEIGHT_FILES:
        raise ConfigError(
            f"weights = {weights!r}",
            where="load",
            hint="`auto`, `best` (those that the verdict names), `ema` (the "
            "averaged ones of the last step), `raw`, or the width of an average such as 0.1",
        )
    if WEIGHT_FILES[weights] not in loaded.tensors:
        raise ConfigError(
            f"has no {weights} weights", where=str(directory.path), hint="a bundle has ema alone"
        )
    return loaded.tensors[WEIGHT_FILES[weights]]
