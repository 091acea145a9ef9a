"""Preservation: the model is drawn to its base's predictions under contexts that the base knows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sfumato import randomness
from sfumato.adapters import Adapter, LoRA, WholeNetwork
from sfumato.conditioners import CategoryConfig, CompositeConditioner
from sfumato.diffusion import NoiseLevel, Objective
from sfumato.generation.diffusion_model import DenoiserConfig, Model
from sfumato.networks import UNetConfig
from sfumato.training.preservation import KnownContexts, Preservation, PreservationConfig

SEED, FIRST, COUNT = 5, 24, 6
KNOWN = torch.tensor([0, 2, 3])


def model(adapter: Adapter) -> Model:
    """A model of four categories of which the last is new."""
    torch.manual_seed(0)
    part = CategoryConfig(size=8).build(["a", "b", "c", "d"], added=1)
    conditioner = CompositeConditioner({"category": part})
    network = UNetConfig(
        channels=32,
        multipliers=(1,),
        blocks=1,
        attention_depths=(0,),
        head_channels=32,
        dropout=0.5,
    ).build(image_channels=1, context=conditioner.sizes)
    with torch.no_grad():
        for parameter in network.parameters():  # zeros at the ends would hide everything
            parameter.add_(0.05 * torch.randn_like(parameter))
    adapter.apply(network, conditioner)
    return Model(network, conditioner, DenoiserConfig())


def disturb(module: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("adapter", [LoRA(rank=2, convolutions=True), WholeNetwork()])
def test_it_is_the_distance_to_the_base_and_zero_at_first(adapter: Adapter) -> None:
    tuned = model(adapter).eval()
    base = copy.deepcopy(tuned)
    known = KnownContexts(
        values={"category": KNOWN}, count=len(KNOWN), base_of=adapter.base_of(tuned)
    )
    objective = Objective()
    preservation = Preservation(PreservationConfig(), known, objective, seed=SEED)
    x0 = torch.randn(COUNT, 1, 8, 8)
    assert not preservation.loss(tuned, x0, first=FIRST, dtype=torch.float32).any()
    disturb(tuned)
    loss = preservation.loss(tuned, x0, first=FIRST, dtype=torch.float32)
    # the same from two separate models
    draws = randomness.uniform(SEED, "preservation", first=FIRST, count=COUNT, per_item=2)
    level = NoiseLevel(*(value.float() for value in objective.levels(draws[:, 0])))
    noise = randomness.normal(
        SEED, "preservation/noise", first=FIRST, shape=(COUNT, 1, 8, 8), device=x0.device
    )
    context = {"category": KNOWN[(draws[:, 1] * 3).long()]}
    with torch.no_grad():
        before, after = (
            one.denoiser().predict(level.mix(x0, noise), level, one.conditioner(context, COUNT))
            for one in (base, tuned)
        )
    assert torch.allclose(loss, (after - before).square().flatten(1).mean(1), rtol=1e-5)
    assert float(loss.detach().min()) > 0


def test_the_base_has_no_dropout_and_no_gradient() -> None:
    adapter = LoRA(rank=2)
    tuned = model(adapter).train()
    disturb(tuned)
    known = KnownContexts(values={"category": KNOWN}, count=3, base_of=adapter.base_of(tuned))
    preservation = Preservation(PreservationConfig(), known, Objective(), seed=SEED)
    x0 = torch.randn(COUNT, 1, 8, 8)
    targets = []
    tuned.network.register_forward_hook(
        lambda module, inputs, output: targets.append((module.training, output.detach()))
    )
    for number in range(2):
        randomness.key_layers(SEED, first=COUNT * number, count=COUNT)
        preservation.loss(tuned, x0, first=FIRST, dtype=torch.float32).sum().backward()
    assert [training for training, _ in targets] == [False, True, False, True]
    assert torch.equal(targets[0][1], targets[2][1])
    assert not torch.equal(targets[1][1], targets[3][1])  # dropout
    assert tuned.training
    assert all(
        (parameter.grad is not None) == parameter.requires_grad
        for name, parameter in tuned.network.named_parameters()
    )
