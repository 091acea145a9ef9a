"""Names of Flux and Stable Diffusion 3 in their original code, against diffusers' own converters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sfumato.interop.lora_files import read_lora
from sfumato.interop.lora_names import LayerNames, underscored
from tests.helpers.lora import change

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

RANK, ROWS = 2, slice(None, None, 61)


@pytest.fixture(scope="module")
def flux() -> LayerNames:
    """Of Flux in its real width, since diffusers' converter knows no other; one block of each."""
    with torch.device("meta"):
        network = diffusers.FluxTransformer2DModel(
            num_layers=1, num_single_layers=1, guidance_embeds=True
        )
    return LayerNames(network)


FLUX = {
    "double_blocks.0.img_attn.qkv": (9216, 3072),
    "double_blocks.0.txt_attn.qkv": (9216, 3072),
    "double_blocks.0.img_attn.proj": (3072, 3072),
    "double_blocks.0.txt_attn.proj": (3072, 3072),
    "double_blocks.0.img_mlp.0": (12288, 3072),
    "double_blocks.0.img_mlp.2": (3072, 12288),
    "double_blocks.0.txt_mlp.0": (12288, 3072),
    "double_blocks.0.txt_mlp.2": (3072, 12288),
    "double_blocks.0.img_mod.lin": (18432, 3072),
    "double_blocks.0.txt_mod.lin": (18432, 3072),
    "single_blocks.0.linear1": (21504, 3072),
    "single_blocks.0.linear2": (3072, 15360),
    "single_blocks.0.modulation.lin": (9216, 3072),
    "final_layer.linear": (64, 3072),
    "final_layer.adaLN_modulation.1": (6144, 3072),
}


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_flux_in_kohyas_files_is_read_as_diffusers_reads_it(
    flux: LayerNames, alpha: float | None, tmp_path: Path
) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, (outputs, inputs) in FLUX.items():
        path = f"lora_unet_{underscored(name)}"
        tensors[f"{path}.lora_down.weight"] = torch.randn(RANK, inputs, generator=generator)
        tensors[f"{path}.lora_up.weight"] = torch.randn(outputs, RANK, generator=generator)
        if alpha is not None and "final_layer" not in name:  # whose alpha diffusers leaves out
            tensors[f"{path}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "f.safetensors")
    read = read_lora(tmp_path / "f.safetensors", flux).changes["transformer"]
    theirs = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    layers = {
        key.removeprefix("transformer.").removesuffix(".lora_A.weight")
        for key in theirs
        if "lora_A" in key
    }
    assert layers == read.keys()
    assert len(layers) == 22
    for layer in layers:
        key = layer if f"{layer}.lora_A.weight" in theirs else f"transformer.{layer}"
        down, up = theirs[f"{key}.lora_A.weight"], theirs[f"{key}.lora_B.weight"]
        expected = up[ROWS] @ down[:, ROWS]
        ours = read[layer].folded()
        found = ours.up[ROWS] @ ours.down[:, ROWS]
        assert found.shape == expected.shape
        assert float((found - expected).abs().max()) < 1e-6
    # with dots and another prefix, as ComfyUI's own files spell it
    dotted = {
        f"diffusion_model.{name}.{end}": tensors[f"lora_unet_{underscored(name)}.{old}.weight"]
        for name in FLUX
        for end, old in (("lora_A.weight", "lora_down"), ("lora_B.weight", "lora_up"))
    }
    save_file(dotted, tmp_path / "g.safetensors")
    assert read_lora(tmp_path / "g.safetensors", flux).changes["transformer"].keys() == layers


class Lenient(dict):
    """A checkpoint in which tensors that no LoRA changes are there, whatever their name."""

    def pop(self, key: str, *default: object):
        return super().pop(key) if key in self else torch.zeros(12, 4)


def test_stable_diffusion_3_in_its_original_names_is_read_as_diffusers_converts_it(
    tmp_path: Path,
) -> None:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    network = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=96, caption_projection_dim=32,
        pooled_projection_dim=64, out_channels=4, pos_embed_max_size=32,
        dual_attention_layers=(0,),
    )  # fmt: skip
    names = LayerNames(network)
    pieces = {
        name: found
        for name, found in names._own[1].items()
        if name.startswith(
            ("joint_blocks", "final_layer", "x_embedder", "t_embedder", "y_embedder")
        )
    }
    spellings = {
        "x_embedder.proj": (32, 4, 2, 2),
        "t_embedder.mlp.0": (32, 256),
        "t_embedder.mlp.2": (32, 32),
        "y_embedder.mlp.0": (32, 64),
        "y_embedder.mlp.2": (32, 32),
        "context_embedder": (32, 96),
        "final_layer.linear": (16, 32),
        "final_layer.adaLN_modulation.1": (64, 32),
        "joint_blocks.0.x_block.attn2.qkv": (96, 32),
        "joint_blocks.0.x_block.attn2.proj": (32, 32),
        "joint_blocks.0.context_block.attn.proj": (32, 32),
        "joint_blocks.0.context_block.mlp.fc1": (128, 32),
        "joint_blocks.0.context_block.mlp.fc2": (32, 128),
        "joint_blocks.0.context_block.adaLN_modulation.1": (192, 32),
        "joint_blocks.0.x_block.adaLN_modulation.1": (288, 32),
        "joint_blocks.1.x_block.adaLN_modulation.1": (192, 32),
        "joint_blocks.1.context_block.adaLN_modulation.1": (64, 32),
    }
    for block in range(2):
        spellings |= {
            f"joint_blocks.{block}.x_block.attn.qkv": (96, 32),
            f"joint_blocks.{block}.context_block.attn.qkv": (96, 32),
            f"joint_blocks.{block}.x_block.attn.proj": (32, 32),
            f"joint_blocks.{block}.x_block.mlp.fc1": (128, 32),
            f"joint_blocks.{block}.x_block.mlp.fc2": (32, 128),
        }
    assert {underscored(name) for name in spellings} - {"context_embedder"} == pieces.keys()
    generator = torch.Generator().manual_seed(0)
    tensors, checkpoint = {}, Lenient()
    for name, (outputs, *inputs) in spellings.items():
        down = torch.randn((RANK, *inputs), generator=generator)
        up = torch.randn((outputs, RANK, *[1] * (len(inputs) - 1)), generator=generator)
        tensors |= {
            f"diffusion_model.{name}.lora_A.weight": down,
            f"diffusion_model.{name}.lora_B.weight": up,
        }
        checkpoint[f"{name}.weight"] = change(down, up)
    save_file(tensors, tmp_path / "f.safetensors")
    read = read_lora(tmp_path / "f.safetensors", names).changes["transformer"]
    converted = convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    for layer, factors in read.items():
        assert float((factors.delta() - converted[f"{layer}.weight"]).abs().max()) < 1e-6
    biases_and_norms = {key for key in converted if not key.endswith(".weight") or "norm_" in key}
    assert {f"{layer}.weight" for layer in read} == {
        key for key in converted if key not in biases_and_norms or key == "norm_out.linear.weight"
    }
