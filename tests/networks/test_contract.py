"""What every network must do, whatever it is made of."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from sfumato.condition import Condition, ContextSizes
from sfumato.errors import ConfigError, ShapeError
from sfumato.networks import DiTConfig, NetworkConfig, UNet, UNetConfig

TINY = UNetConfig(
    channels=32, multipliers=(1, 2), blocks=1, attention_depths=(1,), head_channels=32
)
SMALL = DiTConfig(patch_size=2, hidden_size=32, depth=2, head_dim=16)
CONTEXT = ContextSizes(vector=6, tokens=5, spatial=2)
KINDS = [
    pytest.param(TINY, id="unet"),
    pytest.param(SMALL, id="dit-cross"),
    pytest.param(
        replace(SMALL, token_conditioning="joint", registers=2, bottleneck=6), id="dit-joint"
    ),
    pytest.param(
        replace(SMALL, token_conditioning="sequence", vector_conditioning="tokens", patch_size=4),
        id="dit-sequence",
    ),
]


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
    """Random values in place of the zeros that branches start with, so that nothing is hidden
    behind them.
    """
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
        UNetConfig(
            channels=32,
            multipliers=(1, 2, 3),
            blocks=2,
            attention_depths=(1, 2),
            head_channels=32,
            dropout=0.1,
        ),
        UNetConfig(
            channels=64,
            multipliers=(1, 1),
            attention_depths=(0, 1),
            vector_at="decoder",
            tokens_at="decoder",
            maps_at="decoder",
        ),
        # no multiples of a group
        UNetConfig(channels=40, multipliers=(1, 3), attention_depths=(1,), head_channels=40),
        *KINDS,
        replace(SMALL, depth=5, token_drop=0.5, registers=1, activation_checkpointing=True),
    ],
)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_gradient_reaches_every_parameter(config: NetworkConfig, channels: int) -> None:
    network = awake(config.build(image_channels=channels, context=CONTEXT))
    x = torch.randn(2, channels, 8, 16)
    output = network(x, torch.tensor([0.003, 0.9]), condition(2, 8, 16))
    assert output.shape == x.shape
    output.square().sum().backward()
    still = [
        name
        for name, p in network.named_parameters()
        if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert still == []


@pytest.mark.parametrize("config", KINDS)
def test_images_of_a_batch_do_not_see_one_another(config: NetworkConfig) -> None:
    network = awake(config.build(image_channels=3, context=CONTEXT)).eval()
    x, levels, context = torch.randn(3, 3, 8, 8), torch.rand(3), condition(3, 8, 8)
    together = network(x, levels, context)
    alone = torch.cat(
        [
            network(x[i : i + 1], levels[i : i + 1], context.map(lambda s, i=i: s[i : i + 1]))
            for i in range(3)
        ]
    )
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", KINDS)
def test_level_and_every_context_slot_change_the_output(config: NetworkConfig) -> None:
    network = awake(config.build(image_channels=3, context=CONTEXT)).eval()
    x, context = torch.randn(2, 3, 8, 8), condition(2, 8, 8)
    plain = network(x, torch.full((2,), 10.0), context)
    assert not torch.allclose(plain, network(x, torch.full((2,), 700.0), context))
    for name, slot in context.slots().items():
        if name != "token_mask":
            changed = Condition(**{**context.slots(), name: slot.roll(1, dims=-1)})
            assert not torch.allclose(plain, network(x, torch.full((2,), 10.0), changed)), name


@pytest.mark.parametrize("config", KINDS)
def test_masked_tokens_are_not_seen(config: NetworkConfig) -> None:
    network = awake(config.build(image_channels=3, context=CONTEXT)).eval()
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
    assert any(
        name.startswith("down") and "cross" in name for name, _ in everywhere.named_parameters()
    )
    assert not any(
        name.startswith(("down", "middle")) and "cross" in name
        for name, _ in decoder.named_parameters()
    )
    assert any(name.startswith("up") and "cross" in name for name, _ in decoder.named_parameters())


@pytest.mark.parametrize("config", KINDS)
def test_a_new_network_predicts_zero(config: NetworkConfig) -> None:
    network = config.build(image_channels=3)
    assert network(torch.randn(2, 3, 8, 8), torch.zeros(2), Condition()).abs().max() == 0


def test_a_u_net_is_channels_last() -> None:
    network = UNet(TINY, image_channels=3)
    assert (
        network.down[0]
        .stages[0]
        .block.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    )


@pytest.mark.parametrize("config", KINDS)
@pytest.mark.parametrize("size", [(8, 7), (5, 9), (1, 3), (3, 16)])
def test_any_size_is_taken_and_its_margin_is_cropped_away(
    config: NetworkConfig, size: tuple[int, int]
) -> None:
    """What a network makes of an odd size is what it makes of the padded one, maps included; even
    sizes are not touched.
    """
    network = awake(config.build(image_channels=3, context=CONTEXT)).eval()
    x, levels, context = torch.randn(2, 3, *size), torch.rand(2), condition(2, *size)
    below, right = -size[0] % network.multiple, -size[1] % network.multiple
    found = network(x, levels, context)
    assert found.shape == x.shape
    whole = replace(context, spatial=F.pad(context.spatial, (0, right, 0, below)))
    padded = network(F.pad(x, (0, right, 0, below)), levels, whole)
    torch.testing.assert_close(found, padded[..., : size[0], : size[1]])


@pytest.mark.parametrize("config", [TINY, SMALL])
def test_missing_context_is_named(config: NetworkConfig) -> None:
    with pytest.raises(ShapeError, match=r"vector=0.*vector=6"):
        config.build(image_channels=3, context=ContextSizes(vector=6))(
            torch.randn(1, 3, 8, 8), torch.zeros(1), Condition()
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"attention_depths": (7,)},
        {"head_channels": 48},
        {"blocks": 0},
        {"channels": 33, "attention_depths": ()},  # sines and cosines come in pairs
        # the middle attends
        {"channels": 160, "multipliers": (1, 2, 3), "attention_depths": (1,), "head_channels": 64},
    ],
)
def test_impossible_configuration_is_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="hint"):
        UNetConfig(**{**TINY.__dict__, **wrong})


@pytest.mark.parametrize(
    "wrong",
    [
        {"patch_size": 0},
        {"head_dim": 48},
        {"hidden_size": 40},
        {"token_drop": 1.0},
        {"token_drop": 0.5},
        {"registers": -1},
        {"head_dim": 2},
    ],
)
def test_impossible_transformers_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="hint"):
        replace(SMALL, **wrong)


def test_recomputing_changes_memory_only() -> None:
    plain = awake(SMALL.build(image_channels=3, context=CONTEXT))
    again = replace(SMALL, activation_checkpointing=True).build(image_channels=3, context=CONTEXT)
    again.load_state_dict(plain.state_dict())
    x, levels, context = torch.randn(2, 3, 8, 8), torch.rand(2), condition(2, 8, 8)
    for network in (plain, again):
        network(x, levels, context).square().sum().backward()
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_dropped_tokens_skip_the_inner_blocks_while_training_only() -> None:
    config = replace(SMALL, depth=6, registers=2, token_conditioning="joint")
    full = awake(config.build(image_channels=3, context=CONTEXT))
    half = replace(config, token_drop=0.5).build(image_channels=3, context=CONTEXT)
    half.load_state_dict(full.state_dict())
    seen: list[int] = []
    for block in half.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].shape[1]))
    x, levels, context = torch.randn(2, 3, 8, 8), torch.rand(2), condition(2, 8, 8)
    assert not torch.allclose(half(x, levels, context), full(x, levels, context))
    assert seen == [18, 18, 10, 10, 18, 18]  # 16 patches and 2 registers
    torch.testing.assert_close(half.eval()(x, levels, context), full.eval()(x, levels, context))


def test_patches_are_told_apart_by_where_they_are() -> None:
    network = awake(SMALL.build(image_channels=3)).eval()
    for block in network.blocks:
        for norm in (block.readers[0].q_norm, block.readers[0].k_norm):
            torch.nn.init.constant_(norm.weight, 3.0)  # attention that chooses
    x = torch.randn(1, 3, 8, 8)
    moved = network(x.roll(2, dims=3), torch.ones(1), Condition()).roll(-2, dims=3)
    assert not torch.allclose(moved, network(x, torch.ones(1), Condition()), atol=1e-3)


@pytest.mark.parametrize("shape", [(2, 10), (10, 2), (6, 6), (16, 4)])
def test_any_aspect_ratio_will_do(shape: tuple[int, int]) -> None:
    x = torch.randn(1, 3, *shape)
    assert awake(SMALL.build(image_channels=3))(x, torch.ones(1), Condition()).shape == x.shape


@pytest.mark.slow
@pytest.mark.parametrize("config", KINDS)
def test_compiled_equals_eager(config: NetworkConfig) -> None:
    network = awake(config.build(image_channels=3, context=CONTEXT)).eval()
    x, levels, context = torch.randn(2, 3, 8, 8), torch.rand(2), condition(2, 8, 8)
    with torch.no_grad():
        eager = network(x, levels, context)
        compiled = torch.compile(copy.deepcopy(network))(x, levels, context)
    torch.testing.assert_close(eager, compiled, atol=1e-4, rtol=1e-4)
