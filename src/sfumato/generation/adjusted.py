"""Pipelines that use their model in another way, with the same weights."""

from __future__ import annotations

import math
from dataclasses import replace

from sfumato.adapters import sharing_tensors
from sfumato.conditioners import PipelineTextConditioner
from sfumato.errors import ConfigError
from sfumato.generation.pipeline import Pipeline


def with_embedded_guidance(pipeline: Pipeline, scale: float) -> Pipeline:
    """Return a pipeline whose network is told another guidance scale.

    It costs nothing, unlike `guidance`; networks that were distilled for it read it (FLUX.1 dev).
    The pipeline that is given stays as it is, and shares its weights with the new one.

    Raises:
        ConfigError: if the network is told none.
    """
    if not math.isfinite(scale):
        raise ConfigError(
            f"embedded guidance {scale}", where="sample", hint="use a finite number such as 3.5"
        )
    if pipeline.model.network.embedded_guidance is None:
        raise ConfigError(
            "the network is told no guidance scale: it was not distilled for it",
            where="sample",
            hint="use guidance (--guidance), which costs a second network call",
        )
    model = sharing_tensors(pipeline.model)
    model.network.embedded_guidance = scale
    return replace(pipeline, model=model)


def with_clip_skip(pipeline: Pipeline, count: int) -> Pipeline:
    """Return a pipeline whose prompts are read without the last layers of the text encoders.

    It is `clip_skip` of diffusers, one less than in the web interfaces and in sd-scripts, where 1
    leaves nothing out. As in diffusers, it does not concern negative prompts, nor the absence of
    a prompt. The pipeline that is given stays as it is, and shares its weights with the new one.

    Args:
        count: layers to leave out; 0 for none.
    Raises:
        ConfigError: if the model has no such text encoders, or they have no more layers.
    """
    model = sharing_tensors(pipeline.model)
    parts = [
        part for part in model.conditioner.modules() if isinstance(part, PipelineTextConditioner)
    ]
    if not parts:
        raise ConfigError(
            "the model has no text encoder of a pipeline of diffusers",
            where="clip skip",
            hint="leave it out",
        )
    for part in parts:
        part.skip_layers(count)
    return replace(pipeline, model=model)
