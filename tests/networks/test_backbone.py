"""What trainers, optimizers and auxiliary losses may rely on in any backbone, built in or
wrapped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from sfumato.condition import NO_CONTEXT, Condition, ContextSizes
from sfumato.errors import ConfigError
from sfumato.networks import Backbone, DiTConfig, NetworkConfig, UNetConfig
from sfumato.networks.perceptual import RandomFeatures
from sfumato.training import AlignmentConfig, AuxiliaryConfig, DispersiveConfig

CHANNELS, CONTEXT = 3, ContextSizes(vector=6, tokens=5, spatial=2)


class Wrapped(Backbone):
    """Somebody's module, held as an attribute and called in `forward`; every other member keeps its
    default.
    """

    def __init__(self, *, image_channels: int, context: ContextSizes) -> None:
        super().__init__(image_channels=image_channels, context=context)
        self.inner = nn.Sequential(
            nn.Conv2d(image_channels + 1, 8, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(8, image_channels, 1),
        )

    def forward(self, x: Tensor, noise_input: Tensor, condition: Condition) -> Tensor:
        level = noise_input[:, None, None, None].expand(-1, 1, *x.shape[2:])
        return self.inner(torch.cat([x, level], dim=1))


@dataclass(frozen=True, kw_only=True)
class ToyConfig(NetworkConfig):
    """Of the tests."""

    def build(self, *, image_channels: int, context: ContextSizes = NO_CONTEXT) -> Wrapped:
        return Wrapped(image_channels=image_channels, context=context)


UNET = UNetConfig(
    channels=32, multipliers=(1, 2, 2), blocks=1, attention_depths=(1,), head_channels=32
)
DIT = DiTConfig(patch_size=2, hidden_size=32, depth=3, head_dim=16)
CONFIGS = {
    "unet": UNET,
    "unet of one depth": replace(UNET, multipliers=(1,), attention_depths=()),
    "dit": DIT,
    "dit, joint": replace(DIT, token_conditioning="joint", registers=2, bottleneck=6),
    "dit, sequence": replace(
        DIT, token_conditioning="sequence", vector_conditioning="tokens", patch_size=4
    ),
    "dit, tokens dropped": replace(DIT, depth=5, token_drop=0.5),
    "wrapped": ToyConfig(),
}
every_backbone = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def built(config: NetworkConfig) -> Backbone:
    return config.build(image_channels=CHANNELS, context=CONTEXT)


def called(network: Backbone, height: int, width: int, batch: int = 2) -> Tensor:
    context = Condition(
        vector=torch.randn(batch, CONTEXT.vector),
        tokens=torch.randn(batch, 4, CONTEXT.tokens),
        spatial=torch.randn(batch, CONTEXT.spatial, height, width),
    )
    return network(torch.randn(batch, CHANNELS, height, width), torch.rand(batch), context)


@every_backbone
def test_it_says_what_it_was_built_for(config: NetworkConfig) -> None:
    network = built(config)
    assert (network.image_channels, network.context) == (CHANNELS, CONTEXT)
    assert config.build(image_channels=1).context == NO_CONTEXT


@every_backbone
@pytest.mark.parametrize("size", [(8, 8), (5, 12), (1, 3), (7, 2)])
def test_the_output_has_the_shape_of_x_whatever_its_sides(
    config: NetworkConfig, size: tuple[int, int]
) -> None:
    for network in (built(config), built(config).eval()):
        output = called(network, *size)
        assert output.shape == (2, CHANNELS, *size)
        assert output.isfinite().all()


@every_backbone
def test_other_sides_cost_as_much_as_the_next_multiple(config: NetworkConfig) -> None:
    """Of a side that is one longer, the hidden map is that of the next multiple."""
    network = built(config)
    assert isinstance(network.multiple, int)
    assert network.multiple >= 1
    if not network.hidden_channels:
        assert network.multiple == 1
        return
    seen = probed(network)
    side = 2 * network.multiple
    called(network, side, side)
    called(network, side + network.multiple, side)
    assert seen[0].shape[2] < seen[1].shape[2]
    if network.multiple > 1:
        called(network, side + 1, side)
        assert seen[2].shape == seen[1].shape


def probed(network: Backbone) -> list[Tensor]:
    """What passes through the probe from now on."""
    seen: list[Tensor] = []
    network.probe.register_forward_hook(lambda module, inputs, output: seen.append(output))
    return seen


@every_backbone
def test_one_map_of_hidden_channels_passes_the_probe_with_its_gradient(
    config: NetworkConfig,
) -> None:
    network = built(config)
    seen = probed(network)
    called(network, 8, 12)
    if not network.hidden_channels:
        assert seen == []
        return
    (hidden,) = seen
    assert hidden.ndim == 4
    assert hidden.shape[:2] == (2, network.hidden_channels)
    hidden.square().sum().backward()
    assert any(
        parameter.grad is not None and bool(parameter.grad.any())
        for parameter in network.parameters()
    )


@every_backbone
def test_annotated_layers_are_modules_of_the_network_with_weights(config: NetworkConfig) -> None:
    network = built(config)
    inside = {id(module) for module in network.modules()}
    first, last = network.input_layers(), network.output_layers()
    for layer in (*first, *last):
        assert id(layer) in inside
        assert any(parameter.ndim > 1 for parameter in layer.parameters())
    assert not {id(p) for layer in first for p in layer.parameters()} & {
        id(p) for layer in last for p in layer.parameters()
    }
    built_in = not isinstance(network, Wrapped)
    assert bool(first) == built_in
    assert bool(last) == built_in


@pytest.mark.parametrize(
    ("config", "wider"), [(UNET, {"channels": 64}), (DIT, {"hidden_size": 64})], ids=["unet", "dit"]
)
def test_ends_of_the_annotated_layers_do_not_grow_with_the_width(
    config: NetworkConfig, wider: dict[str, int]
) -> None:
    narrow, wide = built(config), built(replace(config, **wider))

    def ends(network: Backbone) -> tuple[int, int]:
        (last,) = network.output_layers()
        first = next(p for p in network.input_layers()[0].parameters() if p.ndim > 1)
        return first.shape[1], last.weight.shape[0]

    assert ends(narrow) == ends(wide)


@every_backbone
def test_float8_layers_are_linear_layers_of_the_network(config: NetworkConfig) -> None:
    network = built(config)
    inside = {id(module) for module in network.modules()}
    layers = network.float8_layers()
    assert all(isinstance(layer, nn.Linear) and id(layer) in inside for layer in layers)
    assert len({id(layer) for layer in layers}) == len(layers)
    ends = {
        id(module)
        for layer in (*network.input_layers(), *network.output_layers())
        for module in layer.modules()
    }
    assert not ends & {id(layer) for layer in layers}
    assert bool(layers) == isinstance(config, DiTConfig)


LOSSES = {
    "auxiliary.dispersive": AuxiliaryConfig(dispersive=DispersiveConfig()),
    "auxiliary.alignment": AuxiliaryConfig(alignment=AlignmentConfig(encoder="random")),
}


def encoder(name: str) -> RandomFeatures:
    return RandomFeatures()


@pytest.mark.parametrize("where", LOSSES)
def test_a_loss_on_hidden_maps_is_refused_for_a_network_that_passes_none(where: str) -> None:
    with pytest.raises(
        ConfigError, match="Wrapped passes no hidden map through its `probe`"
    ) as caught:
        LOSSES[where].build(built(ToyConfig()), encoder=encoder)
    assert caught.value.where == where
    assert "hidden_channels" in caught.value.hint


@pytest.mark.parametrize("where", LOSSES)
@pytest.mark.parametrize("config", [UNET, DIT], ids=["unet", "dit"])
def test_a_loss_on_hidden_maps_hears_those_of_the_last_call(
    config: NetworkConfig, where: str
) -> None:
    network = built(config)
    auxiliary = LOSSES[where].build(network, encoder=encoder)
    called(network, 8, 8, batch=4)
    ((_, value),) = auxiliary.losses(torch.randn(4, CHANNELS, 8, 8), progress=0.0).values()
    assert value.shape == (4,)
    assert value.isfinite().all()
    value.sum().backward()
    assert any(parameter.grad is not None for parameter in network.parameters())


def test_without_a_loss_on_hidden_maps_nothing_listens() -> None:
    network = built(UNET)
    auxiliary = AuxiliaryConfig(uncertainty=True).build(network, encoder=encoder)
    assert not network.probe._forward_hooks
    assert auxiliary.losses(torch.zeros(1), progress=0.0) == {}
    AuxiliaryConfig(uncertainty=True).build(built(ToyConfig()), encoder=encoder)
