"""Which weights of a run are used."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sfumato.errors import CheckpointError, ConfigError
from sfumato.observability.progress import console
from sfumato.storage import checkpoint
from sfumato.storage.run_directory import RunDirectory
from sfumato.training import post_hoc_ema
from sfumato.training.verdict import Verdict

Weights = Literal["auto", "best", "ema", "raw"] | float
WEIGHT_FILES = {"ema": "ema", "raw": "model"}  # weights -> the file of a checkpoint


def chosen_weights(
    weights: Weights, loaded: checkpoint.Checkpoint, directory: RunDirectory
) -> dict[str, Tensor]:
    """Return the trained parameters; "auto" says so where they are not those of the last step."""
    verdict = Verdict.read(directory.verdict)
    if weights == "auto":
        weights = "ema" if verdict.chosen is None else "best"
    if weights == "best":
        if verdict.chosen is None:
            raise CheckpointError(
                "has no best weights: only a fine-tuning compares them",
                where=str(directory.path),
                hint="use ema or raw",
            )
        if verdict.stop:
            console().print(
                f"weights of step {verdict.chosen.step}: {verdict.sentence()}", markup=False
            )
        return checkpoint.load_snapshot(directory.best, step=verdict.chosen.step)
    if isinstance(weights, float):
        return post_hoc_ema.reconstruct(directory.averages, width=weights)
    if weights not in WEIGHT_FILES:
        raise ConfigError(
            f"weights = {weights!r}",
            where="load",
            hint="`auto`, `best` (those that the verdict of a fine-tuning names), `ema` (the "
            "averaged ones of the last step), `raw`, or the width of an average such as 0.1",
        )
    if WEIGHT_FILES[weights] not in loaded.tensors:
        raise ConfigError(
            f"has no {weights} weights", where=str(directory.path), hint="a bundle has ema alone"
        )
    return loaded.tensors[WEIGHT_FILES[weights]]
