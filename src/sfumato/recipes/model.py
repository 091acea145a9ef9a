"""The untrained model of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from sfumato.conditioners import (
    ConditioningInfo,
    PipelineTextConfig,
    PretrainedTextConfig,
    TextEncoder,
)
from sfumato.data.text_embedding_cache import EmbeddingStore
from sfumato.generation.diffusion_model import Model
from sfumato.recipes.run import Run
from sfumato.storage.cache_folder import cache_folder


def build_model(
    run: Run,
    info: ConditioningInfo,
    directory: Path | None = None,
    *,
    load_base: Callable[[Model], None] = lambda model: None,
) -> Model:
    """Build the untrained model; its initial weights depend on `run.seed`, the info and the base.

    Args:
        directory: the run's directory, if it has one.
        load_base: loads the weights of the run's base into the model.
    """
    channels = run.autoencoder.latent_shape(run.data.channels, directory).channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        conditioner = run.conditioner.build(info, encoder=text_encoder)
        sizes = run.adapter.base_sizes(conditioner.sizes)
        network = run.network.build(image_channels=channels, context=sizes)
        model = Model(network, conditioner, run.denoiser)
        load_base(model)
        run.adapter.apply(network, conditioner)
        return model


def text_encoder(config: PretrainedTextConfig | PipelineTextConfig) -> TextEncoder:
    """Build a pretrained text encoder whose embeddings are kept on disk."""
    encoder = config.text_encoder(cache_folder() / "encoders")
    return replace(encoder, cache=EmbeddingStore(encoder.identity))
