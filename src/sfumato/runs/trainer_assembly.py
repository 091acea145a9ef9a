"""The assembly of a diffusion trainer from the parts of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfumato.autoencoders import Autoencoder
from sfumato.conditioners import ConditioningInfo
from sfumato.data import Dataset
from sfumato.generation.diffusion_model import Model
from sfumato.recipes.run import Run
from sfumato.storage.run_directory import RunDirectory
from sfumato.training import Diffusion, Trainer
from sfumato.training.precision import default_device


def diffusion_trainer(
    run: Run,
    *,
    model: Model,
    autoencoder: Autoencoder,
    dataset: Dataset,
    directory: RunDirectory,
    info: ConditioningInfo,
    saved_config: Mapping[str, Any],
) -> Trainer:
    """Build the trainer of a diffusion model.

    Args:
        model: on its device, with the modules that `with_auxiliary` adds.
        dataset: with what the autoencoder made of it.
    """
    task = Diffusion(
        run,
        model=model,
        autoencoder=autoencoder.to(default_device()),
        objective=run.objective,
        dataset=dataset,
        sampling=run.sampling,
        directory=directory,
        info=info,
    )
    return Trainer(run, task=task, dataset=dataset, directory=directory, saved_config=saved_config)
