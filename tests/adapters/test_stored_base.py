"""A frozen base in bfloat16 or int8: what it computes, what it weighs, and that a run keeps it."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sfumato
from sfumato.adapters import LoRA, WholeNetwork, adapted_layers, without_adapters
from sfumato.contexts import ContextConfig
from sfumato.errors import CheckpointError, ConfigError
from sfumato.interop.merging import merge
from sfumato.networks import Backbone, DiffusersConfig
from sfumato.nn.frozen_layers import (
    FrozenConv2d,
    FrozenLinear,
    dense_state,
    pack,
    pack_layers,
    packed_layers,
    unpack,
)
from sfumato.recipes import Run
from sfumato.storage import checkpoint
from sfumato.training import Budget, CheckpointConfig, PreviewConfig, ValidationConfig
from tests.helpers.diffusers_networks import NETWORKS, call, config, sizes, written
from tests.helpers.runs import fingerprint, images, tiny_run
from tests.training.test_resume import interrupted

pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
STORED = ["bfloat16", "int8"]
SETTINGS = {
    "sample_size": 8, "layers_per_block": 1, "block_out_channels": [16, 32], "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "attention_head_dim": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("networks")


def built(name: str, folder: Path, storage: str) -> Backbone:
    path = folder / name
    settings = config(name, path=str(path)) if path.is_dir() else written(name, path)
    stored = replace(settings, base_dtype=storage)
    return stored.build(image_channels=4, context=sizes(name)).eval()


def rounded_like(stored: nn.Module, original: nn.Module) -> nn.Module:
    """The float32 network with the values that are stored: what the stored one has to compute."""
    same = copy.deepcopy(original)
    same.load_state_dict(dense_state(stored))
    return same


@pytest.mark.parametrize("storage", STORED)
@pytest.mark.parametrize("name", NETWORKS)
def test_it_computes_what_float32_does_with_the_same_values(
    name: str, storage: str, folder: Path
) -> None:
    original, stored = (built(name, folder, kind) for kind in ("float32", storage))
    same = rounded_like(stored, original)
    with torch.no_grad():
        assert torch.equal(call(stored), call(same))
        assert not torch.equal(call(stored), call(original))
    layers = packed_layers(stored)
    linear = torch.int8 if storage == "int8" else torch.bfloat16
    kinds = {FrozenLinear: linear, FrozenConv2d: torch.bfloat16}
    assert all(layer.weight.dtype is kinds[type(layer)] for layer in layers.values())
    others = stored.state_dict().keys() - {
        f"{path}.{part}" for path in layers for part in ("weight", "weight_scale")
    }
    assert all(stored.state_dict()[key].dtype is torch.float32 for key in others)
    large = [
        path
        for path, layer in same.named_modules()
        if type(layer) in (nn.Linear, nn.Conv2d) and path not in layers
    ]
    assert len(large) < len(layers)
    assert all("embed" in path or "conv_" in path for path in large)


@pytest.mark.parametrize("storage", STORED)
@pytest.mark.parametrize("name", ["SD", "Flux"])
def test_gradients_of_the_adapter_are_those_of_float32_with_the_same_values(
    name: str, storage: str, folder: Path
) -> None:
    original, stored = (built(name, folder, kind) for kind in ("float32", storage))
    same = rounded_like(stored, original)
    for network in (stored, same):
        torch.manual_seed(4)
        LoRA(rank=2, convolutions=True).apply(network, nn.Identity())
        with torch.no_grad():
            for layer in adapted_layers(network).values():
                layer.lora_B.normal_(std=0.1)
        call(network).square().mean().backward()
    own, theirs = adapted_layers(stored), adapted_layers(same)
    assert own.keys() == theirs.keys()
    for path, layer in own.items():
        assert layer.lora_A.dtype is layer.lora_B.dtype is torch.float32
        for part in ("lora_A", "lora_B"):
            expected, found = (getattr(one, part).grad for one in (theirs[path], layer))
            assert torch.allclose(
                found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
            )


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize(("storage", "tolerance"), [("bfloat16", 0.01), ("int8", 0.02)])
@pytest.mark.parametrize("name", ["SD", "SDXL", "SD3", "Flux"])
def test_it_is_close_to_the_float32_base(
    name: str, storage: str, tolerance: float, folder: Path
) -> None:
    """Rms of the difference over that of the prediction. In bfloat16 products, storing the base
    in bfloat16 adds nothing: autocast rounds the same weights.
    """
    original, stored = (built(name, folder, kind) for kind in ("float32", storage))
    with torch.no_grad():
        exact = call(original)
        assert error(call(stored), exact) < tolerance
        with torch.autocast("cpu", torch.bfloat16):
            low, same = call(original).float(), call(stored).float()
    assert torch.equal(low, same) is (storage == "bfloat16")
    assert error(same, exact) < error(low, exact) + tolerance


@pytest.mark.parametrize("storage", ["float32", *STORED])
@pytest.mark.parametrize("name", ["DDPM", "SD3"])
def test_step_0_is_the_base_bit_for_bit(name: str, storage: str, folder: Path) -> None:
    network = built(name, folder, storage)
    with torch.no_grad():
        before = call(network)
        LoRA(rank=2, convolutions=True).apply(network, nn.Identity())
        assert torch.equal(call(network), before)
        for layer in adapted_layers(network).values():
            layer.lora_B.normal_(std=0.1)
        assert not torch.equal(call(network), before)
        with without_adapters(network):
            assert torch.equal(call(network), before)


def test_int8_is_that_of_torchao() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    layer = nn.Linear(48, 32)
    weight = layer.weight.detach().clone()
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    values, scale = pack(weight, torch.int8)
    assert scale is not None
    assert torch.equal(values, layer.weight.qdata)
    assert torch.equal(scale, layer.weight.scale)
    assert torch.equal(unpack(values, scale, torch.float32), layer.weight.dequantize())


def test_a_row_of_zeros_stays_zero_and_values_err_by_half_a_step() -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    values, scale = pack(weight, torch.int8)
    restored = unpack(values, scale, torch.float32)
    assert not restored[2].any()
    assert bool(((restored - weight).abs() <= 0.501 * scale).all())


def test_the_backward_pass_keeps_no_unpacked_weight() -> None:
    layer = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Conv2d(1, 4, 3, padding=1, bias=False))
    pack_layers(layer, "int8")
    saved: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(2, 1, 8, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x).sum().backward()
    kept = {(tuple(tensor.shape), tensor.dtype) for tensor in saved}
    assert kept == {
        ((64, 64), torch.int8), ((64, 1), torch.float32), ((4, 1, 3, 3), torch.bfloat16)
    }  # fmt: skip


def stored_run(folder: Path, storage: str, **changes):
    """A run of LoRA on a small U-Net without any context."""
    place = folder / "unet"
    network = DiffusersConfig(
        architecture="UNet2DModel", settings=SETTINGS, path=str(place), base_dtype=storage
    )
    if not place.is_dir():
        torch.manual_seed(3)
        plain = replace(network, path="", base_dtype="float32").build(image_channels=1)
        plain.implementation.save_pretrained(place)
    settings = {
        "adapter": LoRA(rank=2, convolutions=True),
        "budget": Budget(steps=8),
        "checkpoint": CheckpointConfig(every_steps=4),
        "validation": ValidationConfig(every_steps=8, samples=4, copy_samples=0),
        "preview": PreviewConfig(every_steps=8, num=1),
    }
    return tiny_run(
        images(folder / "set"),
        network=network,
        conditioner=ContextConfig(),
        **{**settings, **changes},
    )


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return stored_run(tmp_path_factory.mktemp("run"), "int8")


@pytest.fixture(scope="module")
def trained(settings: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sfumato.train(settings, run=tmp_path_factory.mktemp("trained") / "run")


def test_a_run_resumes_bit_for_bit_and_its_checkpoints_hold_no_base(
    settings: Run, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = interrupted(settings, tmp_path / "broken", monkeypatch, after=5)
    assert fingerprint(sfumato.resume(broken)) == fingerprint(trained)
    newest = checkpoint.read_newest(trained / "checkpoints")[0]
    for group in ("model", "ema"):
        assert newest.tensors[group]
        assert all(".lora_" in key for key in newest.tensors[group])
    state = json.loads((newest.path / "state.json").read_text())
    assert state["frozen_storage"].keys() == {"bfloat16", "float32", "int8"}


def test_the_base_comes_back_and_merging_gives_what_was_trained(
    settings: Run, trained: Path
) -> None:
    pipeline = sfumato.load(trained)
    network, base = pipeline.model.network, settings.network.build(image_channels=1).eval()
    x = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0]), pipeline.model.conditioner({}, 2)
    plain = replace(settings.network, path="", base_dtype="float32").build(image_channels=1).eval()
    merged = merge(settings, network, torch.float32)
    plain.implementation.load_state_dict(merged.tensors)
    assert "rounded to int8" in " ".join(merged.lines)
    with torch.no_grad():
        assert not torch.equal(network(*x), base(*x))
        assert torch.allclose(plain(*x), network(*x), atol=1e-5)
        with without_adapters(pipeline.model):
            assert torch.equal(network(*x), base(*x))
            assert not torch.allclose(plain(*x), network(*x), atol=1e-4)


@pytest.mark.parametrize("other", ["float32", "bfloat16"])
def test_a_base_in_another_precision_is_refused_by_what_differs(trained: Path, other: str) -> None:
    changes = [f"network.base_dtype={other}", "budget.steps=20"]
    with pytest.raises(
        CheckpointError, match=f"are stored as .*{other}.*, and were stored as .*int8"
    ):
        sfumato.resume(trained, overrides=changes)


def test_another_base_of_the_same_precision_is_refused(
    trained: Path, settings: Run, tmp_path: Path
) -> None:
    shutil.copytree(settings.network.path, tmp_path / "other")
    file = tmp_path / "other" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.bias"][0] += 1
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)
    changes = [f"network.path={tmp_path / 'other'}", "budget.steps=20"]
    with pytest.raises(CheckpointError, match="their hash is"):
        sfumato.resume(trained, overrides=changes)


def test_weights_that_are_trained_are_never_stored_in_fewer_bits(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bfloat16 is for frozen weights") as caught:
        stored_run(tmp_path, "bfloat16", adapter=WholeNetwork())
    assert "network.base_dtype=float32" in str(caught.value)
    with pytest.raises(ConfigError, match="the base is a run"):
        stored_run(tmp_path, "int8", base="runs/other")
