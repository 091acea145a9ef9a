"""Pipelines of runs and of folders in diffusers' layout, opened on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato import config as configuration
from sfumato.conditioners import ConditioningInfo, PipelineTextConfig
from sfumato.errors import OutputError
from sfumato.generation.adjusted import with_clip_skip
from sfumato.generation.pipeline import Pipeline
from sfumato.interop.diffusers_folder import ReadFolder, read_folder
from sfumato.recipes.model import build_model
from sfumato.recipes.run import Run
from sfumato.storage.untrusted import image_shape

COMPARED_STEPS = 4  # they divide 1,000, so that no level is rounded
PROMPT = "a photo"
SAME = 1e-4  # of [0, 1]: float32 rounding in another order stays far below


def open_folder(folder: Path, *, variant: str = "") -> tuple[Pipeline, ReadFolder]:
    """Open the pipeline of a folder in diffusers' layout, in float32 on the CPU.

    Returns:
        The pipeline, and what was read.
    Raises:
        CheckpointError, ConfigError: as `read_folder`.
    """
    content = read_folder(folder, variant=variant)
    run = content.run
    pipeline = Pipeline(
        model=build_model(run, content.info).eval().requires_grad_(False),
        autoencoder=content.load_autoencoder(),
        sampling=run.sampling,
        info=content.info,
        image_shape=(run.data.channels, run.data.resolution, run.data.resolution),
    )
    return pipeline, content


def reopen(folder: Path, run: Run) -> Pipeline:
    """Open a folder that was written from a run, whose prompts are read as in the run."""
    pipeline, _ = open_folder(folder)
    count = clip_skip_of(run)
    return with_clip_skip(pipeline, count) if count else pipeline


def clip_skip_of(run: Run) -> int:
    """Return how many layers of its pipeline's text encoders a run leaves out."""
    text = run.conditioner.text
    return text.clip_skip if isinstance(text, PipelineTextConfig) else 0


def open_run(
    run: Run, directory: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Pipeline:
    """Open the pipeline of a run from the state and the weights of a checkpoint, on the CPU.

    Weights of parts that only training uses are left out.

    Args:
        tensors: of the whole model, also those that were not trained.
    """
    info = configuration.parse(ConditioningInfo, state.get("facts"), where=str(directory))
    model = build_model(run, info, directory).eval().requires_grad_(False)
    model.load_state_dict(
        {name: tensor for name, tensor in tensors.items() if not name.startswith("auxiliary.")}
    )
    channels, height, width = image_shape(state, where=directory)
    return Pipeline(
        model=model,
        autoencoder=run.autoencoder.load(directory, channels),
        sampling=run.sampling,
        info=info,
        image_shape=(channels, height, width),
    )


def largest_difference(
    ours: Pipeline, theirs: Pipeline, *, prompt: str = PROMPT, **contexts: Any
) -> float:
    """Return the largest difference between the images of two pipelines from the same noise.

    One image of few steps is made by each, in [0, 1], of the request that the first one reads. The
    guidance of both is that of the first, and acts where that of the second does: a folder of
    diffusers holds neither scale nor interval.

    Args:
        prompt: of the image, for models that read text.
        contexts: further arguments of `Pipeline.sample`.
    """
    asked: dict[str, Any] = {"prompt": prompt} if "text" in ours.reads else {}
    if "category" in ours.reads:
        asked["category"] = ours.categories[0]
    height, width = ours.image_shape[1:]
    images = [
        one.sample(
            1,
            seed=0,
            steps=COMPARED_STEPS,
            size=(height, width),
            guidance=ours.sampling.guidance,
            interval=theirs.sampling.interval,
            **asked,
            **contexts,
        )
        for one in (ours, theirs)
    ]
    return float((images[0] - images[1]).abs().max())


def drawings(pipeline: Pipeline) -> dict[str, Any]:
    """Return something to read for the contexts of a pipeline that lie over the image."""
    channels, height, width = pipeline.image_shape
    generator = torch.Generator().manual_seed(0)
    drawn: dict[str, Tensor] = {
        "doodle": (torch.rand(1, height, width, generator=generator) > 0.2).float(),
        "image": torch.rand(channels, height, width, generator=generator),
    }
    return {name: value for name, value in drawn.items() if name in pipeline.reads}


def require_same(difference: float, dtype: torch.dtype, *, where: Path) -> str:
    """Return a line that says how far the images of a written model are from the run's.

    Raises:
        OutputError: if it was written in float32 and they differ by more than rounding.
    """
    line = f"reopened: one image differs from the run's by at most {difference:.1e} (of 0 to 1)"
    if dtype is torch.float32 and not difference <= SAME:
        raise OutputError(
            f"the written model gives other images than the run ({difference:.1e} of 0 to 1)",
            where=str(where),
            hint="nothing was written; please report this, with the run's config.yaml",
        )
    return line if dtype is torch.float32 else f"{line}, by rounding"
