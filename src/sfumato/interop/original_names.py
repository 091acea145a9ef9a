"""Names of layers in the networks' original code, by those of diffusers.

Stability's U-Net counts its blocks in one list; its and Black Forest Labs' transformers compute
several of diffusers' projections in one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

Shapes = Mapping[str, torch.Size]  # of the weights of a module's layers, by the layer's path


@dataclass(frozen=True)
class Piece:
    """What a name in a file stands for: a layer, or one of several that are fused.

    Attributes:
        part: "unet", "transformer", "text_encoder", "text_encoder_2", ...
        layer: path of the layer in the part.
        rows: outputs of the fused layer that are this layer's, as (start, stop), in this layer's
            order; () for all of them.
    """

    part: str
    layer: str
    rows: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Blocks:
    """Blocks that the original code numbers as diffusers does.

    Attributes:
        theirs, ours: names of the list, in the original code and in diffusers.
        layers: layers of a block, by the original name; several are fused, in this order.
    """

    theirs: str
    ours: str
    layers: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Original:
    """The original code's names of a transformer.

    Attributes:
        layers: outside the blocks, diffusers' names by the original ones.
        blocks: the lists of blocks.
        swapped: layers of diffusers whose two halves, shift and scale, are in the opposite order.
    """

    layers: Mapping[str, str]
    blocks: tuple[Blocks, ...]
    swapped: str = r"norm_out\.linear"

    def pieces(self, shapes: Shapes, part: str) -> dict[str, tuple[Piece, ...]]:
        """Return the layers that each original name stands for."""
        names: dict[str, tuple[str, ...]] = {
            theirs: (ours,) for theirs, ours in self.layers.items()
        }
        for blocks in self.blocks:
            numbers = {name.split(".")[1] for name in shapes if name.startswith(f"{blocks.ours}.")}
            names |= {
                f"{blocks.theirs}.{number}.{theirs}": tuple(
                    f"{blocks.ours}.{number}.{layer}" for layer in layers
                )
                for number in numbers
                for theirs, layers in blocks.layers.items()
            }
        return {
            theirs: self._side_by_side(layers, shapes, part)
            for theirs, layers in names.items()
            if all(layer in shapes for layer in layers)
        }

    def _side_by_side(
        self, layers: tuple[str, ...], shapes: Shapes, part: str
    ) -> tuple[Piece, ...]:
        """Return the layers, each with its rows in the layer that they are fused to."""
        if len(layers) == 1:
            outputs, inputs = shapes[layers[0]][:2]
            is_swapped = re.search(self.swapped, layers[0]) and outputs == 2 * inputs
            halves = ((inputs, outputs), (0, inputs)) if is_swapped else ()
            return (Piece(part, layers[0], halves),)
        ends = list(itertools.accumulate(shapes[layer][0] for layer in layers))
        starts = [0, *ends[:-1]]
        return tuple(
            Piece(part, layer, ((start, stop),))
            for layer, start, stop in zip(layers, starts, ends, strict=True)
        )


def _attention(theirs: str, *ours: str) -> dict[str, tuple[str, ...]]:
    *inputs, output = ours
    return {f"{theirs}.qkv": tuple(inputs), f"{theirs}.proj": (output,)}


IMAGE_STREAM = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
TEXT_STREAM = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
ORIGINALS = {
    "FluxTransformer2DModel": Original(
        layers={
            "img_in": "x_embedder",
            "txt_in": "context_embedder",
            "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
            "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
            "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
            "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
            "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
            "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": "norm_out.linear",
        },
        blocks=(
            Blocks(
                "double_blocks",
                "transformer_blocks",
                {
                    **_attention("img_attn", *IMAGE_STREAM),
                    **_attention("txt_attn", *TEXT_STREAM),
                    "img_mlp.0": ("ff.net.0.proj",),
                    "img_mlp.2": ("ff.net.2",),
                    "txt_mlp.0": ("ff_context.net.0.proj",),
                    "txt_mlp.2": ("ff_context.net.2",),
                    "img_mod.lin": ("norm1.linear",),
                    "txt_mod.lin": ("norm1_context.linear",),
                },
            ),
            Blocks(
                "single_blocks",
                "single_transformer_blocks",
                {
                    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
                    "linear2": ("proj_out",),
                    "modulation.lin": ("norm.linear",),
                },
            ),
        ),
    ),
    "SD3Transformer2DModel": Original(
        layers={
            "x_embedder.proj": "pos_embed.proj",
            "context_embedder": "context_embedder",
            "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
            "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": "norm_out.linear",
        },
        blocks=(
            Blocks(
                "joint_blocks",
                "transformer_blocks",
                {
                    **_attention("x_block.attn", *IMAGE_STREAM),
                    **_attention(
                        "x_block.attn2", *(n.replace("attn", "attn2", 1) for n in IMAGE_STREAM)
                    ),
                    **_attention("context_block.attn", *TEXT_STREAM),
                    "x_block.mlp.fc1": ("ff.net.0.proj",),
                    "x_block.mlp.fc2": ("ff.net.2",),
                    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
                    "context_block.mlp.fc2": ("ff_context.net.2",),
                    "x_block.adaLN_modulation.1": ("norm1.linear",),
                    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
                },
            ),
        ),
        # of the last block only, which has two parts where the others have six
        swapped=r"norm_out\.linear|norm1_context\.linear",
    ),
}

# layers of a U-Net outside its blocks, and of a residual block
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
RESIDUAL = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def stability_names(layers: Mapping[str, object]) -> dict[str, str]:
    """Return Stability's names of the layers of a UNet2DConditionModel, by diffusers' names.

    Source: openaimodel.py of CompVis/stable-diffusion, whose list of input blocks also holds the
    first convolution and the downsampling, each in a place of its own.
    """
    counts = {side: _lengths(layers, f"{side}_blocks", "resnets") for side in ("down", "up")}
    places: dict[str, str] = {}
    number = 0
    for block, length in enumerate(counts["down"]):
        for j in range(length):
            number += 1
            places[f"down_blocks.{block}.resnets.{j}"] = f"input_blocks.{number}.0"
            places[f"down_blocks.{block}.attentions.{j}"] = f"input_blocks.{number}.1"
        number += 1
        places[f"down_blocks.{block}.downsamplers.0"] = f"input_blocks.{number}.0"
    middle = ("resnets.0", "attentions.0", "resnets.1")
    places |= {f"mid_block.{name}": f"middle_block.{i}" for i, name in enumerate(middle)}
    number = -1
    for block, length in enumerate(counts["up"]):
        has_attention = any(name.startswith(f"up_blocks.{block}.attentions.") for name in layers)
        for j in range(length):
            number += 1
            places[f"up_blocks.{block}.resnets.{j}"] = f"output_blocks.{number}.0"
            places[f"up_blocks.{block}.attentions.{j}"] = f"output_blocks.{number}.1"
        places[f"up_blocks.{block}.upsamplers.0"] = f"output_blocks.{number}.{1 + has_attention}"
    return {name: theirs for name in layers if (theirs := _stability_name(name, places))}


def _lengths(layers: Mapping[str, object], blocks: str, inner: str) -> list[int]:
    """Return how many residual blocks each block has."""
    found = {
        (int(match[1]), int(match[2]))
        for name in layers
        if (match := re.match(rf"{blocks}\.(\d+)\.{inner}\.(\d+)\.", name))
    }
    numbers = 1 + max((block for block, _ in found), default=-1)
    return [sum(block == number for block, _ in found) for number in range(numbers)]


def _stability_name(name: str, places: Mapping[str, str]) -> str:
    """Return Stability's name of a layer; "" if there is none."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    for place, theirs in places.items():
        if name.startswith(f"{place}."):
            inner = name.removeprefix(f"{place}.")
            if "resnets" in place:
                return f"{theirs}.{RESIDUAL[inner]}" if inner in RESIDUAL else ""
            if "downsamplers" in place:
                return f"{theirs}.op"
            return f"{theirs}.{inner}"
    return ""
