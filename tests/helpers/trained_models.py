"""Trained models without any training: networks with random weights, and adapters that say
something.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sfumato.adapters import Adapter, LoRA, adapted_layers
from sfumato.autoencoders import Pixels, io
from sfumato.conditioners import ConditioningInfo
from sfumato.generation.pipeline import Pipeline
from sfumato.interop.diffusers_folder import read_folder
from sfumato.interop.trained_model import TrainedModel
from sfumato.recipes import Run
from sfumato.recipes.model import build_model
from tests.helpers.diffusers_models import clip_text, stable_diffusion, stable_diffusion_xl, unet

RANK_2 = LoRA(rank=2, convolutions=True)
RECORD = {"images": 9, "training": 8, "holdout": 1, "captioned": 9, "categories": {}}


def disturb(model: torch.nn.Module, strength: float) -> None:
    """Change every adapter, or all weights where there is none, by a random amount."""
    generator = torch.Generator().manual_seed(2)
    layers = list(adapted_layers(model).values())
    with torch.no_grad():
        for layer in layers:
            layer.lora_B.copy_(strength * torch.randn(layer.lora_B.shape, generator=generator))
        for parameter in [] if layers else model.parameters():
            change = torch.randn(parameter.shape, generator=generator)
            parameter.add_(strength * parameter.std(correction=0) * change)


def trained(
    run: Run, info: ConditioningInfo, directory: Path, *, strength: float, autoencoder: Any = None
) -> TrainedModel:
    """A run's model with disturbed weights, as a finished run would give it."""
    model = build_model(run, info).eval().requires_grad_(False)
    disturb(model.network, strength)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "data.json").write_text(json.dumps(RECORD))
    side = run.data.resolution
    pipeline = Pipeline(
        model=model,
        autoencoder=autoencoder or Pixels(run.data.channels),
        sampling=run.sampling,
        info=info,
        image_shape=(run.data.channels, side, side),
    )
    return TrainedModel(pipeline=pipeline, run=run, directory=directory, step=40)


def tuned(
    folder: Path,
    directory: Path,
    *,
    adapter: Adapter = RANK_2,
    strength: float = 0.05,
    **sampling: Any,
) -> TrainedModel:
    """A model folder of diffusers, as if it had been fine-tuned; the run has its own copy of the
    autoencoder, with the statistics inside its weights.
    """
    content = read_folder(folder)
    run = replace(content.run, adapter=adapter)
    run = replace(run, sampling=replace(run.sampling, **{"steps": 4, **sampling}))
    final = directory / "autoencoder" / "final"
    final.parent.mkdir(parents=True, exist_ok=True)
    autoencoder = io.load(io.save(content.load_autoencoder(), final, {}))
    return trained(run, content.info, directory, strength=strength, autoencoder=autoencoder)


def stable_diffusion_2(folder: Path, **scheduler: Any) -> Path:
    """A pipeline of Stable Diffusion 2's layout: OpenCLIP's activation, velocity, and a schedule
    that ends at pure noise.
    """
    settings = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    stable_diffusion(folder, **{**settings, **scheduler})
    clip_text(act="gelu").save_pretrained(folder / "text_encoder")
    return folder


def sdxl_of_two_widths(folder: Path) -> Path:
    """A pipeline of SDXL's layout whose encoders differ in width, by which programs tell them apart
    in a single file.
    """
    import transformers

    stable_diffusion_xl(folder)
    torch.manual_seed(3)
    config = transformers.CLIPTextConfig(
        hidden_size=48, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2,
        vocab_size=514, bos_token_id=512, eos_token_id=513, pad_token_id=513,
        max_position_embeddings=77, projection_dim=48, hidden_act="gelu",
    )  # fmt: skip
    transformers.CLIPTextModelWithProjection(config).save_pretrained(folder / "text_encoder_2")
    unet(
        80, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 48, use_linear_projection=True,
        transformer_layers_per_block=(1, 2), attention_head_dim=(2, 4),
    ).save_pretrained(folder / "unet")  # fmt: skip
    return folder


def line_with(lines: Sequence[str], words: str) -> str:
    """The one line that contains some words."""
    found = [line for line in lines if words in line]
    assert len(found) == 1, lines
    return found[0]
