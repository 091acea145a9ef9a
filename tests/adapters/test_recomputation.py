"""Recomputed activations: less memory, and the same gradients to the last bit, with an adapter too."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sfumato.adapters import LoRA, adapted_layers, without_adapters
from sfumato.condition import Condition
from sfumato.conditioners import CompositeConditioner
from sfumato.diffusion import Objective
from sfumato.generation.diffusion_model import DenoiserConfig, Model
from sfumato.networks import Backbone
from sfumato.training.preservation import KnownContexts, Preservation, PreservationConfig
from tests.helpers.diffusers_networks import NETWORKS, call, config, sizes, written

pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("networks")


def adapted(name: str, folder: Path, *, recomputed: bool) -> Backbone:
    path = folder / name
    settings = config(name, path=str(path)) if path.is_dir() else written(name, path)
    network = replace(settings, activation_checkpointing=recomputed).build(
        image_channels=4, context=sizes(name)
    )
    torch.manual_seed(4)
    LoRA(rank=2, convolutions=True).apply(network, torch.nn.Identity())
    with torch.no_grad():
        for layer in adapted_layers(network).values():
            layer.lora_B.normal_(std=0.1)
    return network.train()


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    before, after = gradients(one), gradients(other)
    assert before.keys() == after.keys()
    assert sum(float(value.abs().sum()) > 0 for value in before.values()) > 10
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_the_same_in_every_family(name: str, folder: Path) -> None:
    stored, recomputed = (adapted(name, folder, recomputed=flag) for flag in (False, True))
    calls = {"stored": 0, "recomputed": 0}
    for key, network in (("stored", stored), ("recomputed", recomputed)):
        for layer in adapted_layers(network).values():
            layer.register_forward_hook(lambda *_, key=key: calls.update({key: calls[key] + 1}))
        call(network).square().mean().backward()
    assert calls["recomputed"] > 1.3 * calls["stored"]  # it does recompute
    assert_same(stored, recomputed)


def model(folder: Path, *, recomputed: bool) -> Model:
    network = adapted("DDPM", folder, recomputed=recomputed)
    return Model(network, CompositeConditioner({}), DenoiserConfig())


def loss_of_preservation(model: Model) -> torch.Tensor:
    known = KnownContexts(values={}, count=2, base_of=LoRA().base_of(model))
    preservation = Preservation(PreservationConfig(), known, Objective(), seed=0)
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return preservation.loss(model, x0, first=0, dtype=torch.float32).mean()


def test_gradients_of_preservation_are_the_same(folder: Path) -> None:
    """The base is asked between the passes, and the way back has the adapter in force again."""
    models = [model(folder, recomputed=flag) for flag in (False, True)]
    for one in models:
        direct = one.denoiser().network(
            torch.ones(2, 4, 8, 8), torch.tensor([0.2, 0.7]), Condition()
        )
        (direct.square().mean() + loss_of_preservation(one)).backward()
    assert_same(*models)


def test_a_way_back_without_the_adapter_is_an_error_and_not_another_gradient(folder: Path) -> None:
    network = adapted("DDPM", folder, recomputed=True)
    loss = call(network).square().mean()
    with (
        without_adapters(network),
        pytest.raises(torch.utils.checkpoint.CheckpointError, match="different number of tensors"),
    ):
        loss.backward()


def test_copies_recompute_too_and_evaluation_does_not(folder: Path) -> None:
    network = copy.deepcopy(adapted("SD", folder, recomputed=True))
    count = [0]
    for layer in adapted_layers(network).values():
        layer.register_forward_hook(lambda *_: count.append(1))
    with torch.no_grad():
        call(network)
    once = len(count)
    call(network).mean().backward()
    assert len(count) > 2 * once
