"""Tiny networks of all families of diffusers that are supported, without the rest of a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sfumato.condition import Condition, ContextSizes
from sfumato.networks import Backbone
from sfumato.networks.diffusers_models import DiffusersConfig, require_family

UNET = {
    "block_out_channels": [16, 32], "layers_per_block": 1, "sample_size": 8, "norm_num_groups": 4,
    "attention_head_dim": 4,
}  # fmt: skip
BLOCKS = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
HEADS = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
PIXART = {
    "num_embeds_ada_norm": 1000, "norm_elementwise_affine": False, "attention_bias": True,
    "activation_fn": "gelu-approximate", "sample_size": 8, "patch_size": 2, "in_channels": 4,
    "out_channels": 8, **HEADS,
}  # fmt: skip
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDPM": ("UNet2DModel", {
        **UNET, "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    }),
    "SD": ("UNet2DConditionModel", {**UNET, **BLOCKS, "cross_attention_dim": 32}),
    "SDXL": ("UNet2DConditionModel", {
        **UNET, **BLOCKS, "cross_attention_dim": 32, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 32,
        "use_linear_projection": True,
    }),
    "SD3": ("SD3Transformer2DModel", {
        "sample_size": 8, "patch_size": 2, **HEADS, "joint_attention_dim": 32,
        "caption_projection_dim": 32, "pooled_projection_dim": 32, "pos_embed_max_size": 16,
    }),
    "PixArt": ("PixArtTransformer2DModel", {
        **PIXART, "norm_type": "ada_norm_single", "caption_channels": 32, "cross_attention_dim": 32,
        "use_additional_conditions": False,
    }),
    "DiT": ("DiTTransformer2DModel", {**PIXART, "norm_type": "ada_norm_zero"}),
    "Flux": ("FluxTransformer2DModel", {
        "patch_size": 1, "in_channels": 16, **HEADS, "num_layers": 1, "num_single_layers": 2,
        "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8),
        "guidance_embeds": True,
    }),
    "Sana": ("SanaTransformer2DModel", {
        "patch_size": 1, "in_channels": 4, "out_channels": 4, **HEADS,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32,
        "caption_channels": 32, "sample_size": 8,
    }),
    "Lumina2": ("Lumina2Transformer2DModel", {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "num_layers": 2,
        "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 16, "axes_dim_rope": (4, 2, 2),
        "cap_feat_dim": 32,
    }),
    "Z-Image": ("ZImageTransformer2DModel", {
        "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "dim": 32,
        "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32,
        "axes_dims": [8, 4, 4], "axes_lens": [1024, 32, 32],
    }),
    "Qwen-Image": ("QwenImageTransformer2DModel", {
        "patch_size": 2, "in_channels": 16, "out_channels": 4, **HEADS, "joint_attention_dim": 32,
        "axes_dims_rope": (8, 4, 4),
    }),
}  # fmt: skip


def config(name: str, **changes: Any) -> DiffusersConfig:
    """The configuration of a tiny network."""
    architecture, settings = NETWORKS[name]
    return DiffusersConfig(architecture=architecture, settings=settings, **changes)


def sizes(name: str) -> ContextSizes:
    """What it reads."""
    architecture, settings = NETWORKS[name]
    return require_family(architecture).context_sizes(settings)


def written(name: str, folder: Path) -> DiffusersConfig:
    """Write weights that are not zero anywhere, and return the configuration of their folder."""
    torch.manual_seed(3)
    network = config(name).build(image_channels=4, context=sizes(name))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.nan_to_num_().add_(0.02 * torch.randn_like(parameter))
    network.implementation.save_pretrained(folder)  # type: ignore[operator]
    return config(name, path=str(folder))


def call(network: Backbone) -> torch.Tensor:
    """What it predicts for two noisy inputs of 4 x 8 x 8."""
    generator = torch.Generator().manual_seed(1)
    size, channels = network.context.tokens, network.context.vector
    condition = Condition(
        tokens=torch.randn(2, 5, size, generator=generator) if size else None,
        token_mask=torch.tensor([[True] * 5, [True] * 3 + [False] * 2]) if size else None,
        vector=torch.randn(2, channels, generator=generator) if channels > 1 else
        torch.tensor([[3.0], [7.0]]) if channels else None,
    )  # fmt: skip
    x = torch.randn(2, 4, 8, 8, generator=generator)
    return network(x, torch.tensor([0.2, 0.7]), condition)
