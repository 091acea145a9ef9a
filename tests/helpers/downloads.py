"""Model folders as they are downloaded, with what lies beside the files that are needed."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.helpers.diffusers_models import stable_diffusion

OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
UNET, VAE, TEXT = (
    "unet/diffusion_pytorch_model",
    "vae/diffusion_pytorch_model",
    "text_encoder/model",
)


def downloaded(folder: Path) -> Path:
    """Stable Diffusion 1.5 as the hub has it: a safety checker that is named, pickles, variants in half
    precision, the whole model in one file, and names of tensors of its time.
    """
    stable_diffusion(folder, steps_offset=1, set_alpha_to_one=False)
    index = folder / "model_index.json"
    content = json.loads(index.read_text()) | {
        "_diffusers_version": "0.6.0",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "requires_safety_checker": True,
    }
    index.write_text(json.dumps(content))
    for name in ("feature_extractor/preprocessor_config.json", "safety_checker/config.json"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
    _rename(folder / f"{VAE}.safetensors", _old_vae_name)
    _rename(folder / f"{TEXT}.safetensors", lambda name: f"text_model.{name}")
    for stem in (UNET, VAE, TEXT):
        plain = folder / f"{stem}.safetensors"
        tensors = load_file(plain)
        halves = {name: tensor.half() for name, tensor in tensors.items()}
        save_file(halves, plain.with_suffix(".fp16.safetensors"))
        plain.with_suffix(".bin").write_bytes(b"a pickle")
    (folder / "unet/diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"cut off")
    for name in ("v1-5-pruned.ckpt", "v1-5-pruned-emaonly.safetensors", "README.md"):
        (folder / name).write_bytes(b"not read")
    return folder


def _rename(path: Path, name: object) -> None:
    tensors = {name(key): tensor.contiguous() for key, tensor in load_file(path).items()}
    if "text_encoder" in str(path):
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, path, metadata={"format": "pt"})


def _old_vae_name(name: str) -> str:
    if "attentions" not in name:
        return name
    for current, old in OLD_ATTENTION.items():
        name = name.replace(f".{current}.", f".{old}.")
    return name


def half_precision_only(folder: Path) -> Path:
    """Remove all weights of a downloaded folder but those in half precision."""
    for stem in (UNET, VAE, TEXT):
        for path in (folder / stem).parent.glob("*.safetensors"):
            if ".fp16." not in path.name:
                path.unlink()
    return folder
