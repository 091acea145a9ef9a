"""Tiny pipelines of diffusers' newer families with random weights, as `save_pretrained` writes them."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch

from tests.helpers.diffusers_models import (
    autoencoder,
    clip_text,
    clip_tokenizer,
    t5_encoder,
    t5_tokenizer,
)

SHIFT = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 16, "max_image_seq_len": 256}
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def stronger(network: Any, factor: float) -> Any:
    """Scale the weights of linear layers, so that the network answers to small changes."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 2:
                parameter.mul_(factor)
    return network


def dit(folder: Path) -> Path:
    """A pipeline of DiT's layout: 1000 classes, some with names, and a learned variance."""
    import diffusers

    torch.manual_seed(2)
    network = diffusers.DiTTransformer2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=4,
        in_channels=4, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_zero", norm_elementwise_affine=False,
    ).eval()  # fmt: skip
    names = {
        0: "tench, Tinca tinca",
        3: "shark, great white",
        4: "crane, bird",
        5: "crane, machine",
    }
    diffusers.DiTPipeline(
        transformer=network,
        vae=autoencoder(0.18215),
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False
        ),
    ).save_pretrained(folder)
    index = folder / "model_index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {"id2label": {str(k): v for k, v in names.items()}}))
    return folder


def flux(folder: Path, *, guidance_embeds: bool = False, **scheduler: Any) -> Path:
    """A pipeline of FLUX.1's layout: CLIP's pooled text and T5's tokens, packed latents."""
    import diffusers

    torch.manual_seed(2)
    network = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8), guidance_embeds=guidance_embeds,
    ).eval()  # fmt: skip
    settings = {"shift": 3.0, "use_dynamic_shifting": True, **SHIFT, **scheduler}
    diffusers.FluxPipeline(
        transformer=network,
        vae=autoencoder(0.3611, 0.1159, quant=False),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(folder.with_name("tokenizer")),
        text_encoder_2=t5_encoder(32),
        tokenizer_2=t5_tokenizer(512),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**settings),
    ).save_pretrained(folder)
    return folder


def gemma_tokenizer() -> Any:
    """A tokenizer of Gemma's kind that reads letter by letter."""
    from transformers import GemmaTokenizer

    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581"]
    words = [*marks, *string.ascii_letters, *string.digits, *",.!?'-<>:()\n"]
    return GemmaTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[])


def gemma() -> Any:
    """A Gemma 2 model of two layers."""
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(1)
    config = Gemma2Config(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, query_pre_attn_scalar=8,
        max_position_embeddings=2048, sliding_window=2048,
        pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    return Gemma2Model(config).eval()


def sana(folder: Path, scheduler: Any = None) -> Path:
    """A pipeline of Sana's layout: a Gemma 2, and an autoencoder without a variance."""
    import diffusers

    torch.manual_seed(2)
    network = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2,
        attention_head_dim=16, num_cross_attention_heads=2, cross_attention_head_dim=16,
        cross_attention_dim=32, caption_channels=32, sample_size=16,
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1],
        downsample_block_type="conv", upsample_block_type="interpolate",
        decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407,
    ).eval()  # fmt: skip
    diffusers.SanaPipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=gemma(),
        vae=vae,
        transformer=network,
        scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    return folder


def lumina2(folder: Path) -> Path:
    """A pipeline of Lumina-Image 2's layout: a Gemma 2."""
    import diffusers

    torch.manual_seed(2)
    network = diffusers.Lumina2Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=32, num_layers=2,
        num_attention_heads=4, num_kv_heads=2, multiple_of=16, axes_dim_rope=(4, 2, 2),
        cap_feat_dim=32, norm_eps=1e-5,
    ).eval()  # fmt: skip
    diffusers.Lumina2Pipeline(
        transformer=stronger(network, 2.0),
        vae=autoencoder(0.3611, 0.1159, quant=False),
        text_encoder=gemma(),
        tokenizer=gemma_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
    ).save_pretrained(folder)
    return folder


def qwen_tokenizer() -> Any:
    """A tokenizer of Qwen's kind that reads letter by letter."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*sorted(ByteLevel.alphabet()), *marks]
    tokenizer = Qwen2Tokenizer(
        vocab={word: n for n, word in enumerate(words)}, merges=[], extra_special_tokens=marks[1:]
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def z_image(folder: Path) -> Path:
    """A pipeline of Z-Image's layout: a Qwen 3."""
    import diffusers
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(2)
    network = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2,
        n_refiner_layers=1, n_heads=2, n_kv_heads=2, norm_eps=1e-5, qk_norm=True, cap_feat_dim=32,
        rope_theta=256.0, t_scale=1000.0, axes_dims=[8, 4, 4], axes_lens=[1024, 32, 32],
    ).eval()  # fmt: skip
    with torch.no_grad():  # they have no values otherwise
        network.x_pad_token.fill_(0.5)
        network.cap_pad_token.fill_(-0.5)
    config = Qwen3Config(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(0.3611, 0.1159, quant=False),
        text_encoder=Qwen3Model(config).eval(),
        tokenizer=qwen_tokenizer(),
        transformer=network,
    ).save_pretrained(folder)
    return folder


def qwen_image(folder: Path) -> Path:
    """A pipeline of Qwen-Image's layout: a Qwen 2.5 VL, and an autoencoder of videos."""
    import diffusers
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(2)
    network = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=3, joint_attention_dim=32, axes_dims_rope=(8, 4, 4),
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 2.0, 1.0],
    ).eval()  # fmt: skip
    text = {
        "vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift_terminal=0.02, **SHIFT
        ),
        vae=vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=qwen_tokenizer(),
        transformer=stronger(network, 2.0),
    ).save_pretrained(folder)
    return folder
