"""A run's diffusion model and all that trains it, put together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sfumato.autoencoders import Autoencoder
from sfumato.conditioners import Facts
from sfumato.data import Dataset
from sfumato.evaluation.features import extractor
from sfumato.networks.features import Features
from sfumato.pipeline import Model
from sfumato.recipes.run import Run
from sfumato.training import Diffusion, Trainer
from sfumato.training.precision import default_device
from sfumato.training.run_directory import RunDirectory


def diffusion_trainer(
    run: Run,
    *,
    model: Model,
    autoencoder: Autoencoder,
    dataset: Dataset,
    directory: RunDirectory,
    facts: Facts,
    pinned: Mapping[str, Any],
) -> Trainer:
    """Trains a model that is on its device, `with_auxiliary`, on a dataset that holds what the autoencoder made of it."""
    task = Diffusion(
        run, model=model, autoencoder=autoencoder.to(default_device()), objective=run.objective, dataset=dataset, sampling=run.sampling,
        directory=directory, facts=facts,
    )  # fmt: skip
    return Trainer(run, task=task, dataset=dataset, directory=directory, pinned=pinned)


def with_auxiliary(run: Run, model: Model) -> Model:
    """The model on the device that is used, with what is trained beside it.

    Raises:
        ConfigError: if an encoder that is aligned to is missing.
    """
    device = default_device()

    def encoder(name: str) -> Features:
        found = extractor(name)
        return found.to(device) if isinstance(found, torch.nn.Module) else found

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model.auxiliary = run.auxiliary.build(model.network, encoder=encoder)
    return model.to(device)
