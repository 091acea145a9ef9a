"""The adversary: who gets a gradient from what, and the weight at which both sides pull alike."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sfumato.autoencoders.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from sfumato.errors import ConfigError


@pytest.fixture
def adversary() -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(3, channels=16, layers=2)


def test_telling_is_the_hinge_loss_and_reaches_the_adversary_alone(
    adversary: PatchDiscriminator,
) -> None:
    real, made = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32, requires_grad=True)
    loss = discriminator_loss(adversary, real, made)
    expected = [
        (
            F.relu(1 - adversary(real[i : i + 1])).mean()
            + F.relu(1 + adversary(made[i : i + 1])).mean()
        )
        / 2
        for i in range(2)
    ]
    # and no image's depends on the others
    assert torch.allclose(loss, torch.stack(expected), atol=1e-6)
    loss.sum().backward()
    assert made.grad is None
    weights = [parameter for parameter in adversary.parameters() if parameter.ndim > 1]
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in weights
    )


def test_pleasing_is_minus_the_score_and_reaches_the_image_alone(
    adversary: PatchDiscriminator,
) -> None:
    made = torch.randn(2, 3, 32, 32, requires_grad=True)
    loss = generator_loss(adversary, made)
    assert torch.allclose(loss, -adversary(made).flatten(1).mean(1))
    loss.sum().backward()
    assert made.grad is not None
    assert made.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in adversary.parameters())


def test_balanced_losses_pull_alike() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, bias=False)
    x = torch.randn(3, 4)
    one, other = layer(x).square().sum(1), 100 * layer(x).abs().sum(1)
    weight = adaptive_weight(one, other, layer.weight)
    grads = [
        torch.autograd.grad(loss.sum(), layer.weight, retain_graph=True)[0].norm()
        for loss in (one, weight * other)
    ]
    assert torch.allclose(grads[0], grads[1], rtol=1e-3)
    assert not weight.requires_grad
    assert adaptive_weight(one, 1e-9 * other, layer.weight) == 1e4


def test_impossible_adversaries_are_refused() -> None:
    for settings in ({"channels": 8, "layers": 2}, {"channels": 16, "layers": 0}):
        with pytest.raises(ConfigError, match="discriminator"):
            PatchDiscriminator(3, **settings)
