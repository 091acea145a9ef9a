"""Tiny pipelines of diffusers with random weights, as `save_pretrained` writes them."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch

TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def clip_tokenizer(folder: Path) -> Any:
    """A tokenizer of CLIP's kind that reads letter by letter: 256 bytes, inside and at the end of
    a word, and two marks.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    marks = ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: number for number, word in enumerate([*words, *marks])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": marks[0],
        "eos_token": marks[1],
        "unk_token": marks[1],
        "pad_token": marks[1],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return CLIPTokenizer.from_pretrained(folder)


def t5_tokenizer(length: int = 32) -> Any:
    """A tokenizer of T5's kind that reads letter by letter."""
    from transformers import T5TokenizerFast

    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    letters = [(letter, -3.0) for letter in string.ascii_lowercase + string.digits + ",.!?'-"]
    tokenizer = T5TokenizerFast(vocab=marks + letters, extra_ids=0)
    tokenizer.model_max_length = length
    return tokenizer


def clip_text(kind: str = "CLIPTextModel", act: str = "quick_gelu", layers: int = 2) -> Any:
    """A CLIP text model of few layers."""
    import transformers

    torch.manual_seed(1)
    config = transformers.CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=layers,
        vocab_size=514, bos_token_id=512, eos_token_id=513, pad_token_id=513,
        max_position_embeddings=77, projection_dim=32, hidden_act=act,
    )  # fmt: skip
    return getattr(transformers, kind)(config).eval()


def t5_encoder(size: int) -> Any:
    """A T5 encoder of two layers."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(1)
    config = T5Config(
        vocab_size=64, d_model=size, d_kv=8, d_ff=2 * size, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def autoencoder(scaling: float, shift: float | None = None, *, quant: bool = True) -> Any:
    """An AutoencoderKL that halves images once, to 4 channels."""
    import diffusers

    torch.manual_seed(2)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16), in_channels=3, out_channels=3, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=2, layers_per_block=1, scaling_factor=scaling, shift_factor=shift,
        sample_size=32, use_quant_conv=quant, use_post_quant_conv=quant,
    ).eval()  # fmt: skip


def unet(cross: int, **changes: Any) -> Any:
    """A UNet2DConditionModel for latents of 16 x 16."""
    import diffusers

    torch.manual_seed(2)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=16, in_channels=4,
        out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=cross,
        norm_num_groups=4, **{"attention_head_dim": 4, **changes},
    ).eval()  # fmt: skip


def stable_diffusion(folder: Path, **scheduler: Any) -> Path:
    """A pipeline of Stable Diffusion's layout: images of 32 x 32, latents of 4 x 16 x 16."""
    import diffusers

    diffusers.StableDiffusionPipeline(
        vae=autoencoder(0.18215),
        unet=unet(32),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(folder.with_name("tokenizer")),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, **TABLE, **scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def stable_diffusion_xl(folder: Path) -> Path:
    """A pipeline of SDXL's layout: two CLIP encoders, pooled text and sizes."""
    import diffusers

    network = unet(
        64, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32, use_linear_projection=True,
        transformer_layers_per_block=(1, 2), attention_head_dim=(2, 4),
    )  # fmt: skip
    diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(0.13025),
        unet=network,
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(folder.with_name("tokenizer")),
        text_encoder_2=clip_text("CLIPTextModelWithProjection", "gelu"),
        tokenizer_2=clip_tokenizer(folder.with_name("tokenizer_2")),
        scheduler=diffusers.EulerDiscreteScheduler(
            timestep_spacing="leading", steps_offset=1, **TABLE
        ),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def stable_diffusion_3(folder: Path) -> Path:
    """A pipeline of Stable Diffusion 3's layout: two CLIP encoders and a T5, flow matching."""
    import diffusers

    torch.manual_seed(2)
    network = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=96, caption_projection_dim=32,
        pooled_projection_dim=64, out_channels=4, pos_embed_max_size=32,
    ).eval()  # fmt: skip
    diffusers.StableDiffusion3Pipeline(
        transformer=network,
        vae=autoencoder(1.5305, 0.0609, quant=False),
        text_encoder=clip_text("CLIPTextModelWithProjection"),
        tokenizer=clip_tokenizer(folder.with_name("tokenizer")),
        text_encoder_2=clip_text("CLIPTextModelWithProjection", "gelu"),
        tokenizer_2=clip_tokenizer(folder.with_name("tokenizer_2")),
        text_encoder_3=t5_encoder(96),
        tokenizer_3=t5_tokenizer(256),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    return folder


def pixart(folder: Path) -> Path:
    """A pipeline of PixArt-Sigma's layout: a T5, and a network that learns its variance."""
    import diffusers

    torch.manual_seed(2)
    network = diffusers.PixArtTransformer2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=4,
        caption_channels=32, in_channels=4, cross_attention_dim=32, out_channels=8,
        attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        use_additional_conditions=False,
    ).eval()  # fmt: skip
    diffusers.PixArtSigmaPipeline(
        transformer=network,
        vae=autoencoder(0.13025),
        text_encoder=t5_encoder(32),
        tokenizer=t5_tokenizer(300),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="linear"
        ),
    ).save_pretrained(folder)
    return folder
