"""The prior images of a fine-tuning: given by the user, or made once by its base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato.autoencoders import Autoencoder
from sfumato.condition import reorder
from sfumato.conditioners import ConditioningInfo
from sfumato.data import AugmentConfig, Dataset, index, source_at, to_float
from sfumato.errors import CheckpointError, ConfigError
from sfumato.generation.diffusion_model import Model
from sfumato.generation.options import SamplingOptions
from sfumato.generation.pipeline import Pipeline
from sfumato.generation.request import ResolvedRequest
from sfumato.observability.progress import ProgressBar, console
from sfumato.recipes.run import Run
from sfumato.storage import checkpoint
from sfumato.storage.atomic import atomic_path
from sfumato.storage.run_directory import RunDirectory
from sfumato.training.base_comparison import MAX_BASE_SAMPLES
from sfumato.training.precision import default_device
from sfumato.training.preservation import KnownContexts, PreservationConfig
from sfumato.training.prior_images import PriorImages


def prior_images(
    run: Run,
    config: PreservationConfig,
    known: KnownContexts,
    *,
    given: Dataset | None,
    pipeline: Pipeline,
    directory: RunDirectory,
) -> PriorImages:
    """Return the prior images of a run: those that are given, or `config.num` of the base.

    Those of the base are made before the first step, under contexts that it knows, in turn, and from
    noises that no other image has. They are kept in the run's directory with 8 bits for each value,
    where a resumed run reads them.

    Args:
        known: at least one context, if the base makes the images.
        given: see `given_prior`.
        pipeline: of the run's model before its first step, or after it was loaded.
    Raises:
        CheckpointError: if the run has begun, and its images are gone or not the same number.
    """
    if given is not None:
        images, context = _given(run, config, given, pipeline)
    else:
        images = to_float(_kept(run, config.num, known, pipeline, directory))
        context = reorder(known.values, [number % known.count for number in range(config.num)])
    return _encoded(images, context, pipeline.autoencoder, batch_size=run.effective_micro_batch)


def given_prior(
    run: Run, info: ConditioningInfo, image_shape: tuple[int, int, int]
) -> Dataset | None:
    """Return the prior images that a user gives, in the shape of the run's images; None for none.

    Raises:
        DataError: if the source holds none.
        ConfigError: naming what they lack of the model's contexts.
    """
    config = run.preservation
    if config is None or not config.source:
        return None
    settings = replace(
        run.data.of_other(source_at(config.source)),
        size=(image_shape[1], image_shape[2]),
        buckets=None,
        augment=AugmentConfig(),
        holdout=0.0,
        near_duplicates="off",
        categories=info.categories,
        caption=None,
        category=None,
        loss_mask="none",
        exclude=None,
    )
    dataset = index(settings, annotations=run.conditioner.names)
    _require_texts(run, config, dataset)
    _require_categories(run, config, info, dataset)
    console().print(
        f"preservation: the loss of {len(dataset.training)} images of {config.source}", markup=False
    )
    return dataset


def _given(
    run: Run, config: PreservationConfig, dataset: Dataset, pipeline: Pipeline
) -> tuple[Tensor, dict[str, Any]]:
    """Return given images, (N, C, H, W) in [-1, 1], and their contexts."""
    conditioner = pipeline.model.conditioner
    pixels, _, positions = dataset.images(dataset.training)
    images = to_float(pixels)
    context = dataset.context(positions)
    if "text" in context:
        texts = enumerate(context["text"])
        context["text"] = [text or config.prompts[i % len(config.prompts)] for i, text in texts]
    context |= conditioner.training_context(images, context, seed=run.seed, first=0)
    return images, {name: context[name] for name in conditioner.user_inputs if name in context}


def _require_texts(run: Run, config: PreservationConfig, dataset: Dataset) -> None:
    """Raise ConfigError if the model reads text, and neither captions nor prompts are there."""
    count = len(dataset.training)
    without = sum(not captions for captions in dataset.captions(dataset.training))
    if run.conditioner.text is not None and without and not config.prompts:
        raise ConfigError(
            f"{without} of {count} prior images have no caption",
            where=config.source,
            hint='say what they show: preservation.prompts=["a dog"]; or put a .txt with a caption '
            "beside each image",
        )


def _require_categories(
    run: Run, config: PreservationConfig, info: ConditioningInfo, dataset: Dataset
) -> None:
    """Raise ConfigError unless all images have categories that the model knows, if it reads any."""
    if run.conditioner.category is None:
        return
    unknown = [name for name in dataset.categories if name not in info.categories]
    without = int((dataset.labels[torch.from_numpy(dataset.training)] < 0).sum())
    if unknown or without:
        raise ConfigError(
            f"prior images of the category {unknown[0]}, which the model does not have"
            if unknown
            else f"{without} of {len(dataset.training)} prior images have no category",
            where=config.source,
            hint="sort them into one sub-folder for each category: "
            f"{', '.join(info.categories[:20])}",
        )


def _kept(
    run: Run, num: int, known: KnownContexts, pipeline: Pipeline, directory: RunDirectory
) -> Tensor:
    """Return the images of the base, (num, C, H, W), uint8, which are made if the run is new."""
    path = directory.prior_images
    if path.is_file():
        images = load_file(path)["images"]
    elif checkpoint.paths(directory.checkpoints):
        raise CheckpointError(
            "is gone, and images made now may differ from those that training began with",
            where=str(path),
            hint="put it back, or train a new run",
        )
    else:
        images = _made(run, num, known, pipeline)
        with atomic_path(path) as temporary:
            save_file({"images": images}, temporary)
    if len(images) != num:
        raise CheckpointError(
            f"holds {len(images)} images, and preservation.num = {num}",
            where=str(path),
            hint=f"set preservation.num={len(images)}, or train a new run",
        )
    return images


def _made(run: Run, num: int, known: KnownContexts, pipeline: Pipeline) -> Tensor:
    """Return images of the base, (num, C, H, W), uint8."""
    # the noises before are those of the images that forgetting is measured on
    skipped = MAX_BASE_SAMPLES
    numbers = [(number - skipped) % known.count for number in range(skipped + num)]
    request = ResolvedRequest.of(reorder(known.values, numbers), pipeline.image_shape, len(numbers))
    parts = []
    training = pipeline.model.training
    with ProgressBar("making prior images") as bar, known.base_of(pipeline.model) as base:
        batches = replace(pipeline, model=cast(Model, base.eval())).batches(
            len(numbers),
            request,
            SamplingOptions(),
            seed=run.seed,
            batch_size=run.effective_micro_batch,
            skip=range(skipped),
        )
        for first, images in batches:
            parts.append(images.mul(255).round().clamp(0, 255).to(torch.uint8).cpu())
            bar.update((first - skipped + len(images)) / num, f"of {num}")
    pipeline.model.train(training)
    return torch.cat(parts)


@torch.no_grad()
def _encoded(
    images: Tensor, context: Mapping[str, Any], autoencoder: Autoencoder, *, batch_size: int
) -> PriorImages:
    """Return prior images from pixels (N, C, H, W) in [-1, 1]."""
    device, parts = default_device(), images.split(batch_size)
    tensors = {name: value for name, value in context.items() if isinstance(value, Tensor)}
    texts = {name: value for name, value in context.items() if name not in tensors}
    hashed = checkpoint.digest({"images": images, **tensors}) + json.dumps(texts, sort_keys=True)
    return PriorImages(
        moments=torch.cat([autoencoder.moments(part.to(device)).float().cpu() for part in parts]),
        context=dict(context),
        digest=hashlib.sha256(hashed.encode()).hexdigest(),
    )
