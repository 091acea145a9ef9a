"""Names of tensors in single files of Stable Diffusion (the layout of latent-diffusion, LDM), and in
the folders of diffusers.

A table of rows says which tensor of the file belongs to which tensors of a folder: written from
left to right, it makes a file, from right to left, a folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sfumato.errors import ConfigError

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP = "cond_stage_model.transformer.text_model."
OPENCLIP = "cond_stage_model.model."
CLIP_XL = "conditioner.embedders.0.transformer.text_model."
OPENCLIP_XL = "conditioner.embedders.1.model."
TEXT = "text_model."  # that transformers 5 leaves out

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPENCLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


@dataclass(frozen=True)
class Row:
    """A tensor of the file, and those of the folder that it is made of.

    Attributes:
        file: its name in the file.
        folder: their names; several are stacked along the first axis.
        change: of its axes, in the file.
    """

    file: str
    folder: tuple[str, ...]
    change: Literal["none", "transposed", "convolution"] = "none"

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the file's tensor, from the folder's."""
        joined = torch.cat([tensors[name] for name in self.folder])
        if self.change == "transposed":
            return joined.T.contiguous()
        return joined[:, :, None, None] if self.change == "convolution" else joined

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return the folder's tensors, from the file's."""
        if self.change == "transposed":
            tensor = tensor.T
        elif self.change == "convolution":
            tensor = tensor.flatten(1)
        parts = tensor.chunk(len(self.folder))
        return {
            name: part.contiguous().clone() for name, part in zip(self.folder, parts, strict=True)
        }


def unet_rows(names: Iterable[str], settings: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a UNet2DConditionModel with tensors of these names.

    Raises:
        ConfigError: for an architecture that the layout has no names for.
    """
    layers = settings.get("layers_per_block", 2)
    if not isinstance(layers, int):
        raise ConfigError(
            f"layers_per_block = {layers!r} has no names in a single file",
            where="network",
            hint="use the format `diffusers`",
        )
    attended = ["Attn" in kind for kind in settings["up_block_types"]]
    return [Row(UNET + _unet_name(name, layers, attended), (name,)) for name in names]


def _unet_name(name: str, layers: int, attended: list[bool]) -> str:
    """Return the name of a U-Net's tensor in the file, without its prefix."""
    stem, _, kind = name.rpartition(".")
    if stem in _UNET_ENDS:
        return f"{_UNET_ENDS[stem]}.{kind}"
    blocks = layers + 1
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name):
        way, block, part, layer, rest = match.groups()
        number = blocks * int(block) + int(layer) + (way == "down")
        side = "input" if way == "down" else "output"
        return f"{side}_blocks.{number}.{_inner(part, rest)}"
    if match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.+)", name):
        return f"input_blocks.{blocks * (int(match[1]) + 1)}.0.op.{match[2]}"
    if match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.+)", name):
        block = int(match[1])
        return f"output_blocks.{blocks * block + layers}.{1 + attended[block]}.conv.{match[2]}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
        part, layer, rest = match.groups()
        number = 2 * int(layer) + (part == "attentions")
        return f"middle_block.{number}.{_residual(rest) if part == 'resnets' else rest}"
    raise ConfigError(
        f"the tensor {name} has no name in a single file",
        where="network",
        hint="use the format `diffusers`",
    )


def _inner(part: str, rest: str) -> str:
    return f"0.{_residual(rest)}" if part == "resnets" else f"1.{rest}"


def _residual(rest: str) -> str:
    layer, _, kind = rest.partition(".")
    return f"{_RESIDUAL.get(layer, layer)}.{kind}"


def vae_rows(names: Iterable[str], settings: Mapping[str, Any]) -> list[Row]:
    """Return the rows of an AutoencoderKL; its attention is 1 x 1 convolutions in the file."""
    depth = len(settings["up_block_types"])
    return [_vae_row(name, depth) for name in names]


def _vae_row(name: str, depth: int) -> Row:
    def mirrored(match: re.Match[str]) -> str:
        return f"decoder.up.{depth - 1 - int(match[1])}."

    said = re.sub(r"^encoder\.down_blocks\.(\d+)\.", r"encoder.down.\1.", name)
    said = re.sub(r"^decoder\.up_blocks\.(\d+)\.", mirrored, said)
    said = re.sub(r"\.resnets\.(\d)\.", lambda m: f".block.{m[1]}.", said)
    said = re.sub(r"\.mid_block\.block\.(\d)\.", lambda m: f".mid.block_{int(m[1]) + 1}.", said)
    said = re.sub(r"\.(down|up)samplers\.0\.conv\.", r".\1sample.conv.", said)
    said = said.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    match = re.fullmatch(r"(.+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", said)
    if match is None:
        return Row(VAE + said, (name,))
    half, layer, kind = match.groups()
    change: Literal["none", "convolution"] = (
        "convolution" if kind == "weight" and layer != "group_norm" else "none"
    )
    return Row(f"{VAE}{half}.mid.attn_1.{_VAE_ATTENTION[layer]}.{kind}", (name,), change)


def clip_rows(names: Iterable[str], prefix: str) -> list[Row]:
    """Return the rows of a CLIP text model, whose names begin with `text_model.`."""
    return [Row(prefix + name.removeprefix(TEXT), (name,)) for name in names]


def openclip_rows(names: Iterable[str], prefix: str) -> list[Row]:
    """Return the rows of a CLIP text model in OpenCLIP's names.

    Queries, keys and values are one tensor there, and the projection is transposed.
    """
    rows: list[Row] = []
    for name in names:
        said = name.removeprefix(TEXT)
        if said in _OPENCLIP_ENDS:
            rows.append(Row(prefix + _OPENCLIP_ENDS[said], (name,)))
        elif said == "text_projection.weight":
            rows.append(Row(f"{prefix}text_projection", (name,), "transposed"))
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", said):
            block, layer, kind = f"{prefix}transformer.resblocks.{match[1]}.", match[2], match[3]
            if layer in _OPENCLIP_LAYER:
                rows.append(Row(f"{block}{_OPENCLIP_LAYER[layer]}.{kind}", (name,)))
            elif layer == "self_attn.q_proj":
                others = (name.replace("q_proj", f"{one}_proj") for one in "qkv")
                rows.append(Row(f"{block}attn.in_proj_{kind}", tuple(others)))
    return rows


def clip_names(settings: Mapping[str, Any], *, projection: bool) -> list[str]:
    """Return the names of a CLIP text model's tensors, from its configuration."""
    layers = [
        f"{TEXT}encoder.layers.{number}.{layer}"
        for number in range(settings["num_hidden_layers"])
        for layer in (
            *(f"self_attn.{one}_proj" for one in ("q", "k", "v", "out")),
            *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
        )
    ]
    embeddings = [f"{TEXT}embeddings.{one}_embedding.weight" for one in ("token", "position")]
    named = [
        f"{layer}.{kind}"
        for layer in (*layers, f"{TEXT}final_layer_norm")
        for kind in ("weight", "bias")
    ]
    return [*embeddings, *named, *(["text_projection.weight"] if projection else [])]
