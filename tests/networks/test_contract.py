"""What every network must do, whatever it is made of."""

import copy

import pytest
import torch

from sfumato.condition import Condition, ContextSizes
from sfumato.errors import ConfigError, ShapeError
from sfumato.networks import UNet, UNetConfig

TINY = UNetConfig(channels=32, multipliers=(1, 2), blocks=1, attention_depths=(1,), head_channels=32)
CONTEXT = ContextSizes(vector=6, tokens=5, spatial=2)


def condition(batch: int, height: int, width: int) -> Condition:
    mask = torch.ones(batch, 4, dtype=torch.bool)
    mask[:, -1] = False
    return Condition(
        vector=torch.randn(batch, 6),
        tokens=torch.randn(batch, 4, 5),
        token_mask=mask,
        spatial=torch.randn(batch, 2, height, width),
    )


def awake(network: torch.nn.Module) -> torch.nn.Module:
    """Random values in place of the zeros that branches start with, so that nothing is hidden behind them."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return network


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        UNetConfig(channels=32, multipliers=(1,), blocks=1, attention_depths=(), head_channels=32),
        UNetConfig(channels=32, multipliers=(1, 2, 3), blocks=2, attention_depths=(1, 2), head_channels=32, dropout=0.1),
        UNetConfig(
            channels=64,
            multipliers=(1, 1),
            attention_depths=(0, 1),
            vector_at="decoder",
            tokens_at="decoder",
            maps_at="decoder",
        ),
    ],
)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_gradient_reaches_every_parameter(config: UNetConfig, channels: int) -> None:
    network = awake(UNet(config, image_channels=channels, context=CONTEXT))
    x = torch.randn(2, channels, 8, 16)
    output = network(x, torch.tensor([3.0, 900.0]), condition(2, 8, 16))
    assert output.shape == x.shape
    output.square().sum().backward()
    still = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


def test_images_of_a_batch_do_not_see_one_another() -> None:
    network = awake(UNet(TINY, image_channels=3, context=CONTEXT)).eval()
    x, levels, context = torch.randn(3, 3, 8, 8), torch.rand(3) * 1000, condition(3, 8, 8)
    together = network(x, levels, context)
    alone = torch.cat([network(x[i : i + 1], levels[i : i + 1], context.map(lambda s, i=i: s[i : i + 1])) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_level_and_every_context_slot_change_the_output() -> None:
    network = awake(UNet(TINY, image_channels=3, context=CONTEXT)).eval()
    x, context = torch.randn(2, 3, 8, 8), condition(2, 8, 8)
    plain = network(x, torch.full((2,), 10.0), context)
    assert not torch.allclose(plain, network(x, torch.full((2,), 700.0), context))
    for name, slot in context.slots().items():
        if name != "token_mask":
            changed = Condition(**{**context.slots(), name: slot + 1})
            assert not torch.allclose(plain, network(x, torch.full((2,), 10.0), changed)), name


def test_masked_tokens_are_not_seen() -> None:
    network = awake(UNet(TINY, image_channels=3, context=CONTEXT)).eval()
    x, context = torch.randn(2, 3, 8, 8), condition(2, 8, 8)
    other = context.tokens.clone()
    other[:, -1] += 5
    changed = Condition(**{**context.slots(), "tokens": other})
    levels = torch.full((2,), 10.0)
    torch.testing.assert_close(network(x, levels, context), network(x, levels, changed))


def test_decoder_only_cross_attention_leaves_the_encoder_alone() -> None:
    everywhere = UNet(TINY, image_channels=3, context=CONTEXT)
    decoder = UNet(
        UNetConfig(**{**TINY.__dict__, "tokens_at": "decoder"}), image_channels=3, context=CONTEXT
    )  # fmt: skip
    assert any(name.startswith("down") and "cross" in name for name, _ in everywhere.named_parameters())
    assert not any(name.startswith(("down", "middle")) and "cross" in name for name, _ in decoder.named_parameters())
    assert any(name.startswith("up") and "cross" in name for name, _ in decoder.named_parameters())


def test_a_new_network_predicts_zero_and_is_channels_last() -> None:
    network = UNet(TINY, image_channels=3)
    assert network(torch.randn(2, 3, 8, 8), torch.zeros(2), Condition()).abs().max() == 0
    assert network.down[0].stages[0].block.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(8, 7), (6, 9)])
def test_size_that_cannot_be_halved_is_named(size: tuple[int, int]) -> None:
    with pytest.raises(ShapeError, match=rf"{size[0]} x {size[1]}.*\n.*multiples of 2"):
        UNet(TINY, image_channels=3)(torch.randn(1, 3, *size), torch.zeros(1), Condition())


def test_missing_context_is_named() -> None:
    with pytest.raises(ShapeError, match=r"vector=0.*vector=6"):
        UNet(TINY, image_channels=3, context=ContextSizes(vector=6))(torch.randn(1, 3, 8, 8), torch.zeros(1), Condition())


@pytest.mark.parametrize("wrong", [{"attention_depths": (7,)}, {"head_channels": 48}, {"blocks": 0}])
def test_impossible_configuration_is_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="mend"):
        UNetConfig(**{**TINY.__dict__, **wrong})


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    network = awake(UNet(TINY, image_channels=3, context=CONTEXT)).eval()
    x, levels, context = torch.randn(2, 3, 8, 8), torch.rand(2) * 1000, condition(2, 8, 8)
    with torch.no_grad():
        eager = network(x, levels, context)
        compiled = torch.compile(copy.deepcopy(network))(x, levels, context)
    torch.testing.assert_close(eager, compiled, atol=1e-4, rtol=1e-4)
