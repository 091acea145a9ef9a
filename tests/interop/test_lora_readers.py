"""LoRA files of ours, read by diffusers, by peft and by ComfyUI's rule; and theirs, read by us."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from sfumato.interop.lora_export import lora_diffusers, lora_kohya, lora_peft
from sfumato.interop.lora_files import read_lora
from sfumato.interop.lora_names import LayerNames, underscored
from sfumato.interop.lora_writing import write_diffusers, write_kohya, write_peft
from tests.helpers.diffusers_models import (
    pixart,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
)
from tests.helpers.lora import (
    by_comfyui_rule,
    change,
    largest_difference,
    of_peft,
    own_changes,
    random_changes,
    theirs,
    tuned,
)

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of peft, where diffusers misleads it
]
FAMILIES = {"sd": stable_diffusion, "sdxl": stable_diffusion_xl}
F32 = torch.float32


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make(root / name / "model") for name, make in FAMILIES.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_with_alpha_unlike_rank_is_the_same_in_every_file_and_reader(
    folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    trained = tuned(folders[family])
    own = own_changes(trained)
    kinds = {type(layer).__name__ for layer in trained.pipeline.model.network.modules()}
    assert {"LoRALinear", "LoRAConv2d"} <= kinds
    lora_diffusers(trained, tmp_path / "diffusers", F32)
    lora_kohya(trained, tmp_path / "kohya.safetensors", F32)
    lora_peft(trained, tmp_path / "peft", F32)
    for place in ("diffusers", "kohya.safetensors"):
        pipeline = theirs(folders[family])
        pipeline.load_lora_weights(str(tmp_path / place))
        assert largest_difference(of_peft(pipeline.unet), own) == 0.0
    model = peft.PeftModel.from_pretrained(theirs(folders[family]).unet, tmp_path / "peft")
    assert largest_difference(of_peft(model), own) == 0.0
    file = tmp_path / "diffusers" / "pytorch_lora_weights.safetensors"
    read = {key.removeprefix("unet."): value for key, value in by_comfyui_rule(file).items()}
    assert largest_difference(read, own) == 0.0
    spelled = by_comfyui_rule(tmp_path / "kohya.safetensors", ("lora_down", "lora_up"))
    assert len(spelled) == len(own)
    if family == "sd":
        read = {f"lora_unet_{underscored(name)}": value for name, value in own.items()}
        assert largest_difference(spelled, read) == 0.0


@pytest.mark.parametrize("make", [stable_diffusion_3, pixart])
def test_transformers_are_the_same_in_diffusers_and_peft(make, tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    trained = tuned(folder)
    own = own_changes(trained)
    lora_diffusers(trained, tmp_path / "d.safetensors", F32)
    lora_peft(trained, tmp_path / "p", F32)
    lines = lora_kohya(trained, tmp_path / "k.safetensors", F32)
    assert "diffusers does not read transformers in kohya's form" in lines[-1]
    model = peft.PeftModel.from_pretrained(theirs(folder).transformer, tmp_path / "p")
    assert largest_difference(of_peft(model), own) == 0.0
    names = LayerNames(theirs(folder).transformer)
    for file in ("d.safetensors", "p", "k.safetensors"):
        read = read_lora(tmp_path / file, names).changes["transformer"]
        assert largest_difference({name: f.delta() for name, f in read.items()}, own) == 0.0
    pipeline = theirs(folder)
    if hasattr(pipeline, "load_lora_weights"):  # that of PixArt has none
        pipeline.load_lora_weights(str(tmp_path / "d.safetensors"))
        assert largest_difference(of_peft(pipeline.transformer), own) == 0.0


def test_names_of_sdxl_in_files_of_kohya_are_those_of_stability(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Places written out by hand, from the order of blocks in Stability's code."""
    trained = tuned(folders["sdxl"])
    lora_kohya(trained, tmp_path / "kohya.safetensors", F32)
    spelled = by_comfyui_rule(tmp_path / "kohya.safetensors", ("lora_down", "lora_up"))
    own = own_changes(trained)
    block = "transformer_blocks_0_attn1_to_q"
    expected = {
        "conv_in": "input_blocks_0_0",
        "down_blocks.0.resnets.0.conv1": "input_blocks_1_0_in_layers_2",
        "down_blocks.0.downsamplers.0.conv": "input_blocks_2_0_op",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_3_0_skip_connection",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": f"input_blocks_3_1_{block}",
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": f"middle_block_1_{block}",
        "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
        "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": f"output_blocks_1_1_{block}",
        "up_blocks.0.upsamplers.0.conv": "output_blocks_1_2_conv",
        "up_blocks.1.resnets.0.conv2": "output_blocks_2_0_out_layers_3",
        "time_embedding.linear_2": "time_embed_2",
        "add_embedding.linear_1": "label_emb_0_0",
        "conv_out": "out_2",
    }
    for path, name in expected.items():
        assert torch.equal(spelled[f"lora_unet_{name}"], own[path])


@pytest.mark.parametrize("family", FAMILIES)
def test_network_and_text_encoders_of_several_ranks_are_read_back_by_diffusers_and_by_us(
    folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    pipeline = theirs(folders[family])
    encoders = [name for name in ("text_encoder", "text_encoder_2") if hasattr(pipeline, name)]
    modules: dict[str, nn.Module] = {n: getattr(pipeline, n) for n in ("unet", *encoders)}
    names = LayerNames(modules["unet"], lambda: {name: modules[name] for name in encoders})
    changes = {name: random_changes(module) for name, module in modules.items()}
    for name in encoders:  # diffusers reads no LoRA of this one
        changes[name].pop("text_projection", None)
    header = {"format": "pt"}
    write_diffusers(tmp_path / "d.safetensors", changes, names, dtype=F32, header=header)
    write_kohya(tmp_path / "k.safetensors", changes, names, dtype=F32, header=header)
    write_peft(tmp_path / "p", changes, names, dtype=F32, header=header, base="model")
    own = {
        part: {name: change(f.down, f.up) for name, f in layers.items()}
        for part, layers in changes.items()
    }
    for file in ("d.safetensors", "k.safetensors"):
        keys = list(safe_open(tmp_path / file, "pt").keys())
        text = [key for key in keys if "_te" in key or "text_encoder" in key]
        assert text
        assert all("text_model" in key for key in text)
        if file == "k.safetensors":
            numbers = {key.split("_")[1] for key in text}
            assert numbers == ({"te"} if family == "sd" else {"te1", "te2"})
        reader = theirs(folders[family])
        reader.load_lora_weights(str(tmp_path / file))
        for part, layers in own.items():
            assert largest_difference(of_peft(getattr(reader, part)), layers) == 0.0
    for part, layers in own.items():
        model = peft.PeftModel.from_pretrained(
            getattr(theirs(folders[family]), part), tmp_path / "p" / part
        )
        assert largest_difference(of_peft(model), layers) == 0.0
    for place in ("d.safetensors", "k.safetensors", "p"):
        read = read_lora(tmp_path / place, names)
        for part, layers in own.items():
            found = {name: f.delta() for name, f in read.changes[part].items()}
            assert largest_difference(found, layers) == 0.0


def test_headers_say_what_the_file_is_for(folders: dict[str, Path], tmp_path: Path) -> None:
    trained = tuned(folders["sdxl"])
    lora_kohya(trained, tmp_path / "k.safetensors", F32)
    header = safe_open(tmp_path / "k.safetensors", "pt").metadata()
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert header["modelspec.sai_model_spec"] == "1.0.1"
    assert header["modelspec.prediction_type"] == "epsilon"
    assert header["modelspec.resolution"] == "32x32"
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "4")
    assert (header["sfumato.base"], header["sfumato.rank"]) == ("model", "4")
    lora_diffusers(trained, tmp_path / "d", F32)
    other = safe_open(tmp_path / "d" / "pytorch_lora_weights.safetensors", "pt").metadata()
    assert other["sfumato.base_sha256"] == header["sfumato.base_sha256"]
    assert len(header["sfumato.base_sha256"]) == 64
    metadata = json.loads(other["lora_adapter_metadata"])
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (4, 4)
