"""The assembly of a diffusion trainer from the parts of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sfumato.autoencoders import Autoencoder, LatentAutoencoder
from sfumato.autoencoders import io as autoencoder_files
from sfumato.conditioners import ConditioningInfo
from sfumato.data import Dataset
from sfumato.distributed import current
from sfumato.distributed.engines import (
    GIB,
    Footprint,
    choose_name,
    describe_engine,
    make_engine,
)
from sfumato.distributed.sharding import Engine
from sfumato.errors import ConfigError
from sfumato.evaluation.sample_meter import SampleMeter
from sfumato.generation.diffusion_model import Model
from sfumato.generation.pipeline import Pipeline
from sfumato.interop.base_identity import base_parts
from sfumato.networks import Backbone
from sfumato.observability.progress import console
from sfumato.platform import total_memory
from sfumato.recipes.run import Run
from sfumato.runs.base import known_contexts
from sfumato.runs.prior_images import prior_images
from sfumato.storage.base_parts import PARTS
from sfumato.storage.run_directory import RunDirectory
from sfumato.training import Diffusion, Trainer
from sfumato.training.base_comparison import BaseComparison
from sfumato.training.copy_search import CopySearch
from sfumato.training.hooks import HOOKS
from sfumato.training.looks import Looks
from sfumato.training.parameters import count, trainable
from sfumato.training.precision import default_device
from sfumato.training.preservation import KnownContexts, Preservation, PreservationLoss
from sfumato.training.prior_images import PriorImagesLoss


def diffusion_trainer(
    run: Run,
    *,
    model: Model,
    autoencoder: Autoencoder,
    dataset: Dataset,
    directory: RunDirectory,
    info: ConditioningInfo,
    saved_config: Mapping[str, Any],
    prior: Dataset | None = None,
) -> Trainer:
    """Build the trainer of a diffusion model.

    Args:
        model: on its device, with the modules that `with_auxiliary` adds.
        dataset: with what the autoencoder made of it.
        prior: given images of what the base knows.
    """
    autoencoder = autoencoder.to(default_device())
    known = known_contexts(run, model, info, dataset) if run.has_base else None
    pipeline = Pipeline(
        model=model,
        autoencoder=autoencoder,
        sampling=run.sampling,
        info=info,
        image_shape=dataset.image_shape,
    )
    task = Diffusion(
        run,
        model=model,
        autoencoder=autoencoder,
        objective=run.objective,
        dataset=dataset,
        sampling=run.sampling,
        directory=directory,
        info=info,
        preservation=None
        if known is None
        else current().in_turn(lambda: _preservation(run, known, prior, pipeline, directory)),
    )
    task.facts |= _facts(run, model, autoencoder, dataset)
    search = CopySearch(
        dataset=dataset,
        sampling=run.sampling,
        autoencoder=autoencoder,
        info=info,
        seed=run.seed,
        meter=SampleMeter(dataset, reads=tuple(model.conditioner.user_inputs)),
    )
    comparison = (
        None
        if known is None
        else BaseComparison(
            config=run,
            known=known,
            validator=task.validator,
            schedule=run.objective.schedule,
            sampling=run.sampling,
            autoencoder=autoencoder,
            directory=directory,
            info=info,
            image_shape=dataset.image_shape,
        )
    )
    return Trainer(
        run,
        task=task,
        dataset=dataset,
        directory=directory,
        saved_config=saved_config,
        hooks=(*HOOKS, Looks(task.validator, search, directory, comparison)),
        writes_frozen=not run.has_base,
        engine=_engine(run, model),
    )


def _engine(run: Run, model: Model) -> Engine:
    """Return how several processes share the network, and say so."""
    world = current()
    if world.size == 1:
        return Engine(world)
    needs = footprint(run, model.network)
    memory_gib = world.on_first(lambda: memory_of_a_process(world.per_machine))
    name = choose_name(
        run.distributed,
        needs,
        memory_gib=memory_gib,
        size=world.size,
        per_machine=world.per_machine,
    )
    if name != "replicate" and needs.trained < needs.parameters:
        if run.distributed != "auto":
            raise ConfigError(
                "frozen parameters are not shared in parts yet",
                where=f"distributed={run.distributed}",
                hint="set distributed=replicate, or train the whole network",
            )
        name = "replicate"
    if run.compile == "on" and name != "replicate":
        raise ConfigError(
            "a network that processes share in parts is not compiled yet",
            where="compile=on",
            hint="set compile=off, or distributed=replicate if the network fits into each process",
        )
    console().print(
        describe_engine(name, needs, size=world.size, per_machine=world.per_machine), markup=False
    )
    return make_engine(name, world, per_machine=world.per_machine)


def footprint(run: Run, network: Backbone) -> Footprint:
    """Return what a training of a network holds."""
    return Footprint(
        parameters=count(network.parameters()),
        trained=count(trainable(network)),
        averages=1 + len(run.post_hoc_ema.widths),
        largest_unit=max((count(unit.parameters()) for unit in network.units()), default=0)
        or count(network.parameters()),
    )


def memory_of_a_process(per_machine: int) -> float:
    """Return the memory in GiB that one of the processes on this machine can take."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory) / GIB
    return total_memory() / GIB / per_machine


def _facts(run: Run, model: Model, autoencoder: Autoencoder, dataset: Dataset) -> dict[str, Any]:
    """Return what a checkpoint says of the models around the trained one."""
    return {
        PARTS: base_parts(run, model.conditioner),
        "autoencoder": autoencoder_files.identity(autoencoder)
        if isinstance(autoencoder, LatentAutoencoder)
        else "",
        "latents": "computed" if dataset.latents is None else "stored",
    }


def _preservation(
    run: Run,
    known: KnownContexts,
    given: Dataset | None,
    pipeline: Pipeline,
    directory: RunDirectory,
) -> PreservationLoss | None:
    """Return the loss that keeps what the base knew, if it is wanted and anything is known."""
    config = run.preservation
    if config is None:
        return None
    if not known.count and not config.source:
        console().print(
            "preservation has no effect: the base knows nothing that the new images do not have",
            markup=False,
        )
        return None
    if config.has_images:
        prior = prior_images(
            run, config, known, given=given, pipeline=pipeline, directory=directory
        )
        return PriorImagesLoss(config, prior, run.objective, pipeline.autoencoder, seed=run.seed)
    return Preservation(config, known, run.objective, seed=run.seed)
