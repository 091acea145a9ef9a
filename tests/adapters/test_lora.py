"""LoRA: the base is untouched, the adapter alone is trained, and what it does is a change of weights."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

import sfumato
from sfumato.adapters import LoRA, adapted_layers, without_adapters
from sfumato.condition import Condition
from sfumato.errors import ConfigError
from sfumato.networks import DiTConfig, UNetConfig
from sfumato.runs.preparation import prepare
from sfumato.storage import checkpoint
from sfumato.training.parameters import trainable
from tests.helpers.runs import fingerprint, images, tiny_run
from tests.training.test_resume import interrupted

NETWORKS = {
    "unet": UNetConfig(
        channels=32, multipliers=(1, 2), blocks=1, attention_depths=(1,), head_channels=32
    ),
    "dit": DiTConfig(hidden_size=32, depth=2, patch_size=2, head_dim=16),
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    built = NETWORKS[name].build(image_channels=3)
    with torch.no_grad():
        for parameter in built.parameters():  # zeros at the ends would hide everything
            parameter.add_(0.05 * torch.randn_like(parameter))
    return built.eval()


def call(module: nn.Module) -> torch.Tensor:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return module(x, torch.tensor([0.2, 0.7]), Condition())


def disturb(module: nn.Module) -> None:
    """Give the adapters something to say."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in adapted_layers(module).values():
            layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=generator))


@pytest.mark.parametrize("convolutions", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_it_begins_as_the_base_and_is_a_change_of_its_weights(
    name: str, convolutions: bool
) -> None:
    base = network(name)
    adapted = copy.deepcopy(base)
    LoRA(rank=4, alpha=2.0, convolutions=convolutions).apply(adapted, nn.Identity())
    assert torch.equal(call(adapted), call(base))
    disturb(adapted)
    moved = call(adapted)
    assert float((moved - call(base)).abs().max()) > 1e-2
    with without_adapters(adapted):
        assert torch.equal(call(adapted), call(base))
    assert torch.equal(call(adapted), moved)
    merged = copy.deepcopy(base)
    layers = dict(merged.named_modules())
    with torch.no_grad():
        for path, layer in adapted_layers(adapted).items():
            assert torch.linalg.matrix_rank(layer.delta().flatten(1)) <= 4
            layers[path].weight.add_(layer.delta())
    assert torch.allclose(call(merged), moved, atol=2e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_base_keeps_its_names_and_values_and_only_the_adapter_is_trained(name: str) -> None:
    base = network(name)
    adapted = copy.deepcopy(base)
    LoRA(rank=2, layers=("attention", "readers"), convolutions=True).apply(adapted, nn.Identity())
    own = {key: value for key, value in adapted.state_dict().items() if "lora_" not in key}
    assert own.keys() == base.state_dict().keys()
    assert all(torch.equal(own[key], value) for key, value in base.state_dict().items())
    names = [key for key, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert names
    assert all(key.rpartition(".")[2] in ("lora_A", "lora_B") for key in names)
    assert all("attention" in key or "readers" in key for key in names)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"layers": ("nowhere",)}, r"none of \d+ layers fits 'nowhere'\n  hint: names are such as"),
        ({"layers": ("(",)}, "is not a regular expression"),
    ],
)
def test_what_fits_no_layer_is_refused(settings: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        LoRA(**settings).apply(network("unet"), nn.Identity())


def test_a_run_trains_the_adapter_alone_resumes_and_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_run(images(tmp_path / "set"), adapter=LoRA(rank=2, convolutions=True))
    untrained = prepare(settings).model
    count = sum(parameter.numel() for parameter in trainable(untrained.network))
    assert 0 < count < 0.4 * sum(parameter.numel() for parameter in untrained.network.parameters())
    run = sfumato.train(settings, run=tmp_path / "run")
    broken = interrupted(settings, tmp_path / "broken", monkeypatch, after=6)
    assert fingerprint(sfumato.resume(broken)) == fingerprint(run)
    newest = checkpoint.read_newest(run / "checkpoints")[0]
    for group in ("model", "ema"):
        learned = [key for key in newest.tensors[group] if key.startswith("network.")]
        assert learned
        assert all("lora_" in key for key in learned)  # no base tensor in a checkpoint
    pipeline = sfumato.load(run)
    before, after = untrained.network.state_dict(), pipeline.model.network.state_dict()
    base = [key for key in before if "lora_" not in key]
    assert digest(before, base) == digest(after, base)
    with without_adapters(pipeline.model):
        plain = pipeline.sample(2, seed=1, steps=2)
    assert not torch.equal(plain, pipeline.sample(2, seed=1, steps=2))


def digest(tensors: dict[str, torch.Tensor], keys: list[str]) -> str:
    joined = b"".join(tensors[key].contiguous().numpy().tobytes() for key in keys)
    return hashlib.sha256(joined).hexdigest()
