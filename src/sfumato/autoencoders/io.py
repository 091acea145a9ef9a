"""Autoencoders on disk: folders in diffusers' layout, read without its code, and files of tensors.

What is saved has the latents' statistics inside: an `AutoencoderKL` in the weights of its 1 x 1
convolutions, so that any program that reads the folder gets latents of zero mean and unit variance
and needs no scaling factor; others have them beside the weights, in latents.json.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato.autoencoders.codec import Codec
from sfumato.autoencoders.diffusers_codec import ForeignCodec
from sfumato.autoencoders.kl import KLAutoencoder, KLConfig
from sfumato.autoencoders.latent_space import LatentAutoencoder
from sfumato.autoencoders.tiny import TinyAutoencoder
from sfumato.errors import CheckpointError
from sfumato.networks.diffusers_weights import weight_files
from sfumato.storage.atomic import atomic_folder
from sfumato.storage.manifest import require_files, table_of_files
from sfumato.storage.weight_files import unreadable

WEIGHTS, CONFIG, STATISTICS = "diffusion_pytorch_model.safetensors", "config.json", "latents.json"
MANIFEST = "manifest.json"  # of what we write: the size and hash of each file
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def save(
    latents: LatentAutoencoder,
    folder: Path,
    metadata: Mapping[str, Any],
    *,
    manifest: bool = False,
) -> Path:
    """Write an autoencoder to a folder, atomically; `metadata` goes into latents.json.

    Args:
        manifest: whether to write the sizes and hashes of the files, which `load` then compares.
    Raises:
        CheckpointError: if it cannot be written.
    """
    normalized = fold_statistics(latents) if isinstance(latents.codec, KLAutoencoder) else latents
    config, tensors = _plain(normalized.codec)
    statistics = {
        "mean": normalized.mean.tolist(),
        "deviation": normalized.deviation.tolist(),
        **metadata,
    }
    try:
        with atomic_folder(folder, durable=True) as temporary:
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                temporary / WEIGHTS,
            )
            (temporary / CONFIG).write_text(json.dumps(config, indent=1))
            (temporary / STATISTICS).write_text(json.dumps(statistics, indent=1))
            if manifest:
                table = {"files": table_of_files(temporary)}
                (temporary / MANIFEST).write_text(json.dumps(table, indent=1))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot be written: {error}", where=str(folder), hint="free some disk space"
        ) from None
    return folder


def load(
    path: str | Path, decoder: str | Path | None = None, *, variant: str = ""
) -> LatentAutoencoder:
    """Load an autoencoder from a folder in diffusers' layout, or a tiny one from two files.

    The files hold the tensors of its encoder and decoder. A folder's latents are scaled as
    latents.json says, else as its own configuration does (scaling and shift factor, or means and
    deviations).

    Args:
        variant: of a folder's weights, e.g. "fp16"; without it, a variant is taken where it is the
            only one.
    Raises:
        CheckpointError: naming what is missing, not supported, or differs from what was saved.
    """
    path = Path(path)
    if path.is_file() and decoder is not None:
        tiny = TinyAutoencoder(_tensors(path), _tensors(Path(decoder)))
        return LatentAutoencoder(
            tiny.eval().requires_grad_(False),
            torch.zeros(tiny.latent_channels),
            torch.ones(tiny.latent_channels),
        )
    if (path / MANIFEST).is_file():
        require_files(path, _json(path / MANIFEST).get("files"))
    config = _json(path / CONFIG)
    codec = _codec(config, path, variant)
    mean, deviation = _statistics(config, path, codec.latent_channels)
    return LatentAutoencoder(codec.eval().requires_grad_(False), mean, deviation)


def identity(latents: LatentAutoencoder) -> str:
    """Return a hash of the weights and statistics, under which latents are cached."""
    digest = hashlib.sha256(type(latents.codec).__name__.encode())
    for name, tensor in sorted(latents.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def fold_statistics(latents: LatentAutoencoder) -> LatentAutoencoder:
    """Fold the statistics into the weights: mean 0 and deviation 1 are left to apply."""
    codec = latents.codec
    assert isinstance(codec, KLAutoencoder)
    mean, deviation, size = latents.mean, latents.deviation, codec.latent_channels
    folded = KLAutoencoder(
        replace(codec.config, projections="quant"), image_channels=codec.image_channels
    ).to(mean.device)
    state = dict(codec.state_dict())
    for name, width in (("quant_conv", 2 * size), ("post_quant_conv", size)):
        state.setdefault(f"{name}.weight", torch.eye(width, device=mean.device)[:, :, None, None])
        state.setdefault(f"{name}.bias", torch.zeros(width, device=mean.device))
    scale = torch.cat([1 / deviation, torch.ones_like(deviation)])
    shift = torch.cat([-mean / deviation, -2 * deviation.log()])
    state["quant_conv.weight"] = state["quant_conv.weight"] * scale[:, None, None, None]
    state["quant_conv.bias"] = state["quant_conv.bias"] * scale + shift
    state["post_quant_conv.bias"] = (
        state["post_quant_conv.bias"] + state["post_quant_conv.weight"][:, :, 0, 0] @ mean
    )
    state["post_quant_conv.weight"] = (
        state["post_quant_conv.weight"] * deviation[None, :, None, None]
    )
    folded.load_state_dict(state)
    return LatentAutoencoder(
        folded.eval().requires_grad_(False), torch.zeros_like(mean), torch.ones_like(deviation)
    )


def _plain(codec: Codec) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a codec's configuration and tensors, both under diffusers' names."""
    if isinstance(codec, KLAutoencoder):
        return _kl_config(codec), codec.state_dict()
    if isinstance(codec, TinyAutoencoder):
        return _tiny_config(codec), codec.tensors()
    assert isinstance(codec, ForeignCodec)
    return codec.config, codec.model.state_dict()


def _kl_config(codec: KLAutoencoder) -> dict[str, Any]:
    config, depth = codec.config, len(codec.config.channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.38.0",
        "act_fn": "silu",
        "block_out_channels": list(config.channels),
        "down_block_types": ["DownEncoderBlock2D"] * depth,
        "up_block_types": ["UpDecoderBlock2D"] * depth,
        "in_channels": codec.image_channels,
        "out_channels": codec.image_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.blocks,
        "norm_num_groups": config.groups,
        "mid_block_add_attention": config.attention == "middle",
        "use_quant_conv": config.projections == "quant",
        "use_post_quant_conv": config.projections == "quant",
        "sample_size": 256,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
        "force_upcast": False,
    }


def _tiny_config(codec: TinyAutoencoder) -> dict[str, Any]:
    encoder, decoder = codec.depths()
    return {
        "_class_name": "AutoencoderTiny",
        "_diffusers_version": "0.38.0",
        "in_channels": codec.image_channels,
        "out_channels": codec.image_channels,
        "latent_channels": codec.latent_channels,
        "num_encoder_blocks": [blocks for blocks, _ in encoder],
        "encoder_block_out_channels": [width for _, width in encoder],
        "num_decoder_blocks": [blocks for blocks, _ in decoder],
        "decoder_block_out_channels": [width for _, width in decoder],
    }


def _codec(config: Mapping[str, Any], folder: Path, variant: str) -> Codec:
    """Build the codec of a folder.

    Raises:
        CheckpointError: for an unknown kind, or weights that do not fit.
    """
    kind = config.get("_class_name")
    if kind == "AutoencoderKL":
        return _kl(config, folder, variant)
    if kind == "AutoencoderTiny":
        tensors = _all_tensors(folder, variant)
        halves = [
            {name: value for name, value in tensors.items() if name.startswith(half)}
            for half in ("encoder.", "decoder.")
        ]
        return TinyAutoencoder(*halves)
    return ForeignCodec.load(str(kind), folder, variant=variant)


def _kl(config: Mapping[str, Any], folder: Path, variant: str) -> KLAutoencoder:
    try:
        widths = tuple(config["block_out_channels"])
        supported = (
            set(config["down_block_types"]) == {"DownEncoderBlock2D"}
            and set(config["up_block_types"]) == {"UpDecoderBlock2D"}
            and config.get("act_fn", "silu") == "silu"
            and config["in_channels"] == config["out_channels"]
            and config.get("use_quant_conv", True) == config.get("use_post_quant_conv", True)
        )
        if not supported:
            raise CheckpointError(
                "unsupported block types in the AutoencoderKL configuration",
                where=str(folder / CONFIG),
            )
        shape = KLConfig(
            channels=widths,
            latent_channels=config["latent_channels"],
            blocks=config["layers_per_block"],
            groups=config.get("norm_num_groups", 32),
            attention="middle" if config.get("mid_block_add_attention", True) else "none",
            projections="quant" if config.get("use_quant_conv", True) else "none",
        )
        codec = KLAutoencoder(shape, image_channels=config["in_channels"])
        codec.load_state_dict(
            {
                _current_name(name): tensor.float()
                for name, tensor in _all_tensors(folder, variant).items()
            }
        )
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"does not fit an AutoencoderKL ({' '.join(str(error).split())[:300]})",
            where=str(folder),
            hint="download it again; the weights may belong to another config.json",
        ) from None
    return codec


def _current_name(name: str) -> str:
    """Return a tensor's current name; attention layers once had other names."""
    parts = name.split(".")
    if "attentions" in parts and parts[-2] in _OLD_ATTENTION:
        parts[-2] = _OLD_ATTENTION[parts[-2]]
    return ".".join(parts)


def _statistics(config: Mapping[str, Any], folder: Path, channels: int) -> tuple[Tensor, Tensor]:
    """Read the mean and deviation of a folder's latents, (c,) each, from its files."""
    if (folder / STATISTICS).is_file():
        statistics = _json(folder / STATISTICS)
        mean, deviation = (
            torch.tensor(statistics.get("mean", [])),
            torch.tensor(statistics.get("deviation", [])),
        )
    elif config.get("latents_mean") and config.get("latents_std"):
        mean, deviation = (
            torch.tensor(config["latents_mean"]).flatten(),
            torch.tensor(config["latents_std"]).flatten(),
        )
    else:
        mean = torch.full((channels,), float(config.get("shift_factor") or 0.0))
        deviation = torch.full((channels,), 1 / float(config.get("scaling_factor") or 1.0))
    if len(mean) != channels or len(deviation) != channels or not bool((deviation > 0).all()):
        raise CheckpointError(
            "the number of latent statistics does not match the latent channels", where=str(folder)
        )
    return mean, deviation


def _all_tensors(folder: Path, variant: str) -> dict[str, Tensor]:
    """Read the tensors of all shards of a folder."""
    return {
        name: tensor
        for file in weight_files(folder, variant=variant)
        for name, tensor in _tensors(file).items()
    }


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{name} has values that are not finite", where=str(path), hint="download it again"
            )
    return tensors


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"cannot be read: {error}",
            where=str(path),
            hint="name a folder with config.json and safetensors",
        ) from None
