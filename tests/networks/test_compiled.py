"""One checkpoint computes the same eagerly and compiled, forwards and backwards. (Recomputed: see
the contract tests.)
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from sfumato.condition import Condition, ContextSizes
from sfumato.networks import DiTConfig, NetworkConfig, UNetConfig
from sfumato.networks.perceptual import RandomFeatures
from sfumato.training import AlignmentConfig, AuxiliaryConfig, DispersiveConfig

CONTEXT = ContextSizes(vector=6, tokens=5)
DIT = DiTConfig(hidden_size=32, depth=3, head_dim=16, token_conditioning="joint", registers=1)
UNET = UNetConfig(
    channels=32, multipliers=(1, 2), blocks=1, attention_depths=(1,), head_channels=32
)


def awake(config: NetworkConfig) -> torch.nn.Module:
    """With random values where training begins with zeros."""
    torch.manual_seed(0)
    network = config.build(image_channels=3, context=CONTEXT)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return network


def results(network: torch.nn.Module, size: int = 8) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output, and gradients of its square."""
    torch.manual_seed(1)
    x, level = torch.randn(2, 3, size, size), torch.tensor([3.0, 900.0])
    condition = Condition(
        vector=torch.randn(2, 6),
        tokens=torch.randn(2, 4, 5),
        token_mask=torch.tensor([[True] * 4, [True] * 3 + [False]]),
    )
    network.zero_grad()
    output = network(x, level, condition)
    output.square().mean().backward()
    return output.detach(), [p.grad.clone() for p in network.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("config", [DIT, UNET], ids=["dit", "unet"])
def test_compiled_it_is_the_same_network(config: NetworkConfig) -> None:
    network = awake(config)
    compiled = copy.deepcopy(network)
    compiled.compile()
    for size in (8, 16, 32):
        for a, b in zip(results(network, size), results(compiled, size), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert network.state_dict().keys() == compiled.state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize("config", [DIT, UNET], ids=["dit", "unet"])
def test_hidden_maps_are_heard_from_a_compiled_network(config: NetworkConfig) -> None:
    network = awake(config)
    settings = AuxiliaryConfig(dispersive=DispersiveConfig(), alignment=AlignmentConfig())
    auxiliary = settings.build(network, encoder=lambda name: RandomFeatures())
    images, found = torch.rand(2, 3, 8, 8), []
    for _ in range(2):
        results(network)
        found.append(
            {
                name: value.detach().clone()
                for name, (_, value) in auxiliary.losses(images, progress=0.0).items()
            }
        )
        network.compile()
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(DIT, id="dit"),
        pytest.param(UNET, id="unet"),
        pytest.param(replace(DIT, activation_checkpointing=True), id="dit-recomputed"),
    ],
)
def test_buckets_are_compiled_once_more_and_never_again(config: NetworkConfig) -> None:
    """A second shape makes sides symbols, whatever shapes come then."""
    torch._dynamo.reset()  # shapes that other tests showed are forgotten
    network, counter, counts = awake(config), CompileCounter(), []
    network.compile(backend=counter)
    for height, width in ((16, 16), (8, 24), (24, 8), (12, 16), (32, 32), (16, 16)):
        condition = Condition(
            vector=torch.randn(2, 6),
            tokens=torch.randn(2, 4, 5),
            token_mask=torch.ones(2, 4, dtype=torch.bool),
        )
        network(torch.randn(2, 3, height, width), torch.ones(2), condition).sum().backward()
        counts.append(counter.frame_count)
    assert counts[1] == 2 * counts[0] > 0
    assert set(counts[1:]) == {counts[1]}


@pytest.mark.parametrize(
    "config",
    [pytest.param(DIT, id="dit", marks=pytest.mark.slow), pytest.param(UNET, id="unet")],
)
@pytest.mark.slow
def test_networks_of_several_sizes_are_compiled_in_one_process(config: NetworkConfig) -> None:
    """Sizes that were seen to change are symbols from then on."""
    for channels, vector in ((3, 6), (1, 8), (4, 10)):
        network = config.build(image_channels=channels, context=ContextSizes(vector=vector))
        network.compile(backend="eager")  # the graph alone, which is quick
        x = torch.randn(2, channels, 8, 8)
        assert network(x, torch.ones(2), Condition(vector=torch.randn(2, vector))).shape == x.shape
