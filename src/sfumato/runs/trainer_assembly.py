"""The assembly of a diffusion trainer from the parts of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfumato.autoencoders import Autoencoder
from sfumato.conditioners import ConditioningInfo
from sfumato.data import Dataset
from sfumato.generation.diffusion_model import Model
from sfumato.observability.progress import console
from sfumato.recipes.run import Run
from sfumato.runs.base import known_contexts
from sfumato.storage.run_directory import RunDirectory
from sfumato.training import Diffusion, Trainer
from sfumato.training.base_comparison import CompareWithBase
from sfumato.training.hooks import HOOKS
from sfumato.training.monitors import Validator
from sfumato.training.precision import default_device
from sfumato.training.preservation import KnownContexts, Preservation


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
    autoencoder = autoencoder.to(default_device())
    known = known_contexts(run, model, info, dataset) if run.has_base else None
    task = Diffusion(
        run,
        model=model,
        autoencoder=autoencoder,
        objective=run.objective,
        dataset=dataset,
        sampling=run.sampling,
        directory=directory,
        info=info,
        preservation=_preservation(run, known),
    )
    hooks = HOOKS
    if known is not None:
        validator = Validator(
            config=run,
            dataset=dataset,
            schedule=run.objective.schedule,
            conditioner=model.conditioner,
            autoencoder=autoencoder,
            device=default_device(),
        )
        comparison = CompareWithBase(
            config=run,
            known=known,
            validator=validator,
            schedule=run.objective.schedule,
            sampling=run.sampling,
            autoencoder=autoencoder,
            directory=directory,
            info=info,
            image_shape=dataset.image_shape,
        )
        hooks = (*HOOKS, comparison)
    return Trainer(
        run,
        task=task,
        dataset=dataset,
        directory=directory,
        saved_config=saved_config,
        hooks=hooks,
        writes_frozen=not run.has_base,
    )


def _preservation(run: Run, known: KnownContexts | None) -> Preservation | None:
    """Return the loss that keeps what the base knew, if it is wanted and anything is known."""
    if run.preservation is None or known is None:
        return None
    if not known.count:
        console().print(
            "preservation has no effect: the base knows nothing that the new images do not have",
            markup=False,
        )
        return None
    return Preservation(run.preservation, known, run.objective, seed=run.seed)
