"""What single files of Stable Diffusion's layout say by themselves, and where their parts are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sfumato.foreign_models import CONFIG
from sfumato.interop.base_folder import BaseFolder
from sfumato.interop.diffusers_folder import read_json
from sfumato.interop.ldm_names import (
    CLIP,
    CLIP_XL,
    OPENCLIP,
    OPENCLIP_XL,
    Row,
    clip_rows,
    openclip_rows,
)

VELOCITY, ZERO_SNR = "v_pred", "ztsnr"  # tensors without values, whose names say it all
SUFFIX = ".safetensors"
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
ARCHITECTURES = {
    CLIP: "stable-diffusion-v1",
    OPENCLIP: "stable-diffusion-v2",
    OPENCLIP_XL: "stable-diffusion-xl-v1-base",
}
# what programs take for granted that read a single file: the scale of latents, and the schedule
LATENT_SCALES = {CLIP: 0.18215, OPENCLIP: 0.18215, OPENCLIP_XL: 0.13025}
TABLE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "trained_betas": None,
}
MARKERS = {
    CLIP: f"{CLIP}embeddings.position_embedding.weight",
    OPENCLIP: f"{OPENCLIP}positional_embedding",
    OPENCLIP_XL: f"{OPENCLIP_XL}positional_embedding",
}


@dataclass(frozen=True)
class FileFacts:
    """What a single file says by itself, as programs read it that have nothing else.

    Attributes:
        architecture: in ModelSpec's words; "" for a file without a text encoder of these families.
        prediction: "epsilon" or "v".
        zero_snr: whether the schedule ends at pure noise.
    """

    architecture: str
    prediction: str
    zero_snr: bool


def facts_of_names(names: set[str]) -> FileFacts:
    """Return what the names of a single file's tensors say."""
    prefix = next((prefix for prefix, marker in MARKERS.items() if marker in names), "")
    return FileFacts(
        architecture=ARCHITECTURES.get(prefix, ""),
        prediction="v" if VELOCITY in names else "epsilon",
        zero_snr=ZERO_SNR in names,
    )


def text_prefixes(folder: BaseFolder) -> list[tuple[str, str]]:
    """Return the text encoders of a pipeline, each with the prefix of its tensors in the file.

    Stable Diffusion 2 reads an encoder of OpenCLIP, which is told by its activation.
    """
    if folder.index.get("_class_name") == "StableDiffusionXLPipeline":
        return [("text_encoder", CLIP_XL), ("text_encoder_2", OPENCLIP_XL)]
    settings = read_json(folder.path / "text_encoder" / CONFIG)
    quick = settings.get("hidden_act", "quick_gelu") == "quick_gelu"
    return [("text_encoder", CLIP if quick else OPENCLIP)]


def text_rows(names: list[str], prefix: str) -> list[Row]:
    """Return the rows of a text encoder whose tensors in the file begin with `prefix`."""
    return (clip_rows if prefix in (CLIP, CLIP_XL) else openclip_rows)(names, prefix)


def scheduler_of(facts: FileFacts, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a scheduler's configuration as the file overrules it, and lines that say so."""
    changes: dict[str, Any] = {}
    if facts.prediction == "v" and config.get("prediction_type") != "v_prediction":
        changes["prediction_type"] = "v_prediction"
    if facts.zero_snr and not config.get("rescale_betas_zero_snr"):
        # other spacings never visit the end, which is what the key is about
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    said = ", ".join(f"{key}={value}" for key, value in changes.items())
    return {**config, **changes}, [f"the file overrules the scheduler: {said}"] if changes else []
