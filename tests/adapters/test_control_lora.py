"""Control by a wider input layer and a LoRA, against networks that are built wider."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sfumato.adapters import ControlLoRA, without_adapters
from sfumato.condition import Condition, ContextSizes
from sfumato.errors import ConfigError
from sfumato.networks import Backbone, DiTConfig, UNetConfig
from sfumato.nn.controllable import is_drawn
from sfumato.nn.frozen_layers import pack_layers
from sfumato.nn.widenable import InputLayer, Widenable
from tests.helpers.diffusers_networks import NETWORKS, config, sizes

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
MAPS, SIDE = 2, 8
OWN = {
    "our U-Net": UNetConfig(
        channels=16, multipliers=(1, 2), blocks=1, attention_depths=(1,), head_channels=16
    ),
    "our U-Net, maps on the way up": UNetConfig(
        channels=16, multipliers=(1, 2), blocks=1, attention_depths=(), maps_at="decoder"
    ),
    "our DiT": DiTConfig(patch_size=2, hidden_size=32, depth=2, head_dim=16, bottleneck=8),
}
ALL = [*NETWORKS, *OWN]


def built(name: str, *, maps: int = 0) -> Backbone:
    """A network of 4 channels without zeros in its weights; one of ours may read maps."""
    torch.manual_seed(3)
    if name in OWN:
        network: Backbone = OWN[name].build(image_channels=4, context=ContextSizes(spatial=maps))
    else:
        network = config(name).build(image_channels=4, context=sizes(name))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.nan_to_num_().add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def conditioner(network: Backbone, maps: int = MAPS) -> Any:
    """What the adapter is told of a conditioner, with maps on the network's own grid."""
    module = nn.Module()
    module.sizes, module.factor = replace(network.context, spatial=maps), 1
    return module


def controlled(name: str, *, control: float = 0.0, lora: float = 0.0) -> Backbone:
    """A network with control, whose new weights are moved at random."""
    network = built(name)
    ControlLoRA(rank=2).apply(network, conditioner(network))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            by = control if key.endswith(".control") else lora if "lora_B" in key else 0.0
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return network


def inputs(network: Backbone, count: int = 2) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    """Noisy inputs, levels, and a condition with no maps that a base reads."""
    generator = torch.Generator().manual_seed(1)
    size, channels = network.context.tokens, network.context.vector
    condition = Condition(
        tokens=torch.randn(count, 5, size, generator=generator) if size else None,
        token_mask=(torch.arange(5) < 4).expand(count, -1) if size else None,
        vector=torch.randn(count, channels, generator=generator) if channels > 1 else
        torch.arange(1.0, count + 1)[:, None] if channels else None,
    )  # fmt: skip
    x = torch.randn(count, 4, SIDE, SIDE, generator=generator)
    return x, torch.linspace(0.2, 0.7, count), condition


def drawn(count: int = 2) -> torch.Tensor:
    return torch.rand(count, MAPS, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


def nothing(count: int = 2) -> torch.Tensor:
    return torch.zeros(count, MAPS, 1, 1)


@torch.no_grad()
def predicted(network: Backbone, maps: torch.Tensor | None = None) -> torch.Tensor:
    x, level, condition = inputs(network, 2 if maps is None else len(maps))
    return network(x, level, replace(condition, spatial=maps))


def wider(name: str, weight: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Predictions of a network that is built for more input channels, with the base's weights and
    these beside them.
    """
    base = built(name)
    layer, pixels = base.input_layer().layer, base.input_layer().pixels
    both = torch.cat(
        [part.unflatten(1, (pixels, -1)) for part in (layer.weight.detach(), weight)], dim=2
    ).flatten(1, 2)
    (place,) = (key for key, p in base.named_parameters() if p is layer.weight)
    state = base.state_dict() | {place: both}
    if name in OWN:
        wide = built(name, maps=MAPS)
        wide.load_state_dict(state)
        return lambda x, level, condition, maps: wide(x, level, replace(condition, spatial=maps))
    import diffusers

    kind, settings = NETWORKS[name]
    cells = 4 if name in ("Flux", "Qwen-Image") else 1
    outputs = settings.get("out_channels", 4 * cells if name == "Flux" else 4)
    if name == "Z-Image":  # it would predict as many channels as it reads
        model = base.model
        model.all_x_embedder["2-1"] = nn.Linear(both.shape[1], both.shape[0])
    else:
        sides = {"in_channels": (4 + MAPS) * cells, "out_channels": outputs}
        model = getattr(diffusers, kind)(**{**settings, **sides}).eval()
    model.load_state_dict({key.removeprefix("model."): value for key, value in state.items()})
    base.model = model
    return lambda x, level, condition, maps: base.call(
        torch.cat([x, maps], dim=1), level, condition
    )[:, :4]


@pytest.mark.parametrize("name", [name for name in ALL if "way up" not in name])
def test_predictions_are_those_of_a_network_that_is_built_wider(name: str) -> None:
    network = controlled(name, control=0.3)
    weight = network.input_layer().layer.control.detach()
    x, level, condition = inputs(network)
    with torch.no_grad():
        expected = wider(name, weight)(x, level, condition, drawn())
    scale = float(expected.abs().max())
    assert float((predicted(network, drawn()) - expected).abs().max()) < 1e-5 * scale
    assert float((predicted(built(name)) - expected).abs().max()) > 1e-3 * scale


@pytest.mark.parametrize("name", ALL)
def test_it_begins_as_the_base_and_stays_so_where_nothing_is_drawn(name: str) -> None:
    base = predicted(built(name))
    fresh, tuned = controlled(name), controlled(name, control=0.3, lora=0.3)
    for maps in (drawn(), nothing(), torch.full((2, MAPS, SIDE, SIDE), 0.5)):
        assert torch.equal(predicted(fresh, maps), base)
    assert torch.equal(predicted(tuned, nothing()), base)
    blank = torch.tensor([0.0, 1.0]).view(1, MAPS, 1, 1).expand(2, -1, SIDE, SIDE)
    assert torch.equal(predicted(tuned, blank), base)
    steered = predicted(tuned, drawn())
    assert (steered - base).flatten(1).abs().amax(1).min() > 1e-3 * float(base.abs().max())
    with without_adapters(tuned):
        assert torch.equal(predicted(tuned, drawn()), base)
    mixed = torch.cat([drawn()[:1], blank[1:]])
    assert torch.equal(predicted(tuned, mixed), torch.cat([steered[:1], base[1:]]))
    own, state = built(name).state_dict(), tuned.state_dict()
    assert all(torch.equal(state[key], value) for key, value in own.items())
    added = state.keys() - own.keys()
    assert all(key.endswith((".control", ".lora_A", ".lora_B")) for key in added)
    assert sum(key.endswith(".control") for key in added) == 1


@pytest.mark.parametrize("name", ALL)
def test_gradients_reach_what_is_trained_and_nothing_else(name: str) -> None:
    network = controlled(name, control=0.1, lora=0.1).train()
    x, level, condition = inputs(network)
    network(x, level, replace(condition, spatial=drawn())).square().mean().backward()
    trained = {key for key, p in network.named_parameters() if p.requires_grad}
    reached = {key for key, p in network.named_parameters() if p.grad is not None}
    assert all(key.endswith((".control", ".lora_A", ".lora_B")) for key in trained)
    text = ("txt", "add_out", "context")  # of the text, after its last use
    assert all(any(part in key for part in text) for key in trained - reached)
    assert network.input_layer().layer.control.grad.any()


def test_a_batch_without_drawings_can_be_trained_on_and_teaches_nothing() -> None:
    network = controlled("our U-Net", control=0.1, lora=0.1).train()
    x, level, condition = inputs(network)
    network(x, level, replace(condition, spatial=nothing())).square().mean().backward()
    gradients = [p.grad for p in network.parameters() if p.requires_grad]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_stored_input_layers_are_widened_too(storage: Any) -> None:
    torch.manual_seed(0)
    layers = {
        "linear": (nn.Linear(8, 6), torch.randn(3, 5, 12)),
        "convolution": (nn.Conv2d(4, 6, 3, stride=2, padding=1), torch.randn(3, 6, 7, 7)),
    }
    for layer, x in layers.values():
        network = nn.Sequential(layer, nn.Linear(1, 1))
        pack_layers(network, storage)
        fake = Fake(network, InputLayer(network[0]), channels=4)
        ControlLoRA(rank=1).apply(fake, conditioner(fake))
        with torch.no_grad():
            layer.control += torch.randn_like(layer.control)
        dense = getattr(layer, "dense", lambda layer=layer: layer.weight)()
        weight = torch.cat([dense, layer.control], dim=1)
        expected = (
            F.linear(x, weight, layer.bias)
            if isinstance(layer, nn.Linear)
            else F.conv2d(x, weight, layer.bias, stride=2, padding=1)
        )
        assert float((layer(x) - expected).detach().abs().max()) < 1e-5


class Fake(Widenable):
    """A network that is an input layer and little else."""

    def __init__(self, layers: nn.Module, inputs: InputLayer, channels: int) -> None:
        super().__init__()
        self.layers, self._inputs, self.image_channels = layers, inputs, channels
        self.context = ContextSizes()

    def input_layer(self) -> InputLayer:
        return self._inputs


def test_a_sheet_is_drawn_on_if_a_map_has_two_values() -> None:
    maps = torch.zeros(5, 2 * 4, 2, 2)  # two maps of 4 x 4, in cells of 2 x 2
    maps[1, 4:] = 1.0  # the second map is 1 everywhere
    maps[2, 3, 1, 0] = 0.1
    maps[3, 1] = 1.0  # stripes, the same in every cell
    maps[4] = 0.7
    assert is_drawn(maps, 4).tolist() == [False, False, True, True, False]
    assert is_drawn(torch.zeros(1, 8, 1, 1), 4).tolist() == [False]


def test_what_cannot_be_controlled_is_refused() -> None:
    network = built("our U-Net")
    with pytest.raises(ConfigError, match="needs a context that lies over the image"):
        ControlLoRA().apply(network, conditioner(network, maps=0))
    with pytest.raises(ConfigError, match="Linear names no input layer"):
        ControlLoRA().apply(nn.Linear(1, 1), conditioner(network))
    strange: Any = SimpleNamespace(layer=nn.Bilinear(1, 1, 1), pixels=1)
    with pytest.raises(ConfigError, match="a Bilinear, which cannot be widened"):
        ControlLoRA().apply(Fake(nn.Identity(), strange, channels=1), conditioner(network))
    with pytest.raises(ConfigError, match=r"none of \d+ layers fits 'nowhere'"):
        ControlLoRA(layers=("nowhere",)).apply(network, conditioner(network))
