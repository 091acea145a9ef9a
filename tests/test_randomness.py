"""Keyed draws: item i is a function of (seed, purpose, i)."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from scipy import stats
from torch import Tensor

from sfumato import randomness


@pytest.mark.parametrize("size", [1, 3, 8, 17])
def test_item_does_not_depend_on_who_asks(size: int) -> None:
    whole = randomness.normal(1, "noise", first=0, shape=(20, size))
    part = randomness.normal(1, "noise", first=7, shape=(5, size))
    assert torch.equal(whole[7:12], part)
    whole = randomness.uniform(1, "time", first=0, count=20, per_item=size)
    assert torch.equal(whole[7:12], randomness.uniform(1, "time", first=7, count=5, per_item=size))


def test_seeds_purposes_and_items_differ() -> None:
    draws = [
        randomness.normal(seed, purpose, first=first, shape=(1, 16))
        for seed in (0, 1)
        for purpose in ("a", "b")
        for first in (0, 1, 2**40)
    ]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws)


def test_normal_draws_are_normal_and_uniform_ones_uniform() -> None:
    normal = randomness.normal(3, "noise", first=0, shape=(1000, 300))
    assert stats.kstest(normal.flatten().numpy()[:100_000], "norm").pvalue > 1e-3
    assert abs(float(normal.mean())) < 0.01
    assert abs(float(normal.std()) - 1) < 0.005
    assert abs(float(stats.kurtosis(normal.flatten().numpy()))) < 0.05
    assert normal.abs().max() < 7
    pairs = torch.corrcoef(torch.stack([normal[:, 0], normal[:, 1], normal[:, 2]]))
    assert (pairs - torch.eye(3)).abs().max() < 0.15
    uniform = randomness.uniform(3, "time", first=0, count=100_000)
    assert stats.kstest(uniform.flatten().numpy(), "uniform").pvalue > 1e-3
    assert uniform.min() >= 0
    assert uniform.max() < 1


def test_permutations_are_permutations_and_differ() -> None:
    one, two = (randomness.permutation(0, "plan", index=i, size=50) for i in (0, 1))
    assert sorted(one) == list(range(50))
    assert one.tolist() != two.tolist()
    assert one.tolist() == randomness.permutation(0, "plan", index=0, size=50).tolist()


def test_the_global_stream_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    randomness.normal(0, "noise", first=0, shape=(4, 4))
    assert torch.equal(torch.rand(3), expected)


def test_normal_draws_have_unit_variance_to_three_digits_and_normal_tails() -> None:
    draws = randomness.normal(11, "noise", first=0, shape=(2000, 1000)).double()
    assert abs(float(draws.mean())) < 5 / 2000**0.5 / 1000**0.5
    assert abs(float(draws.var()) - 1) < 5 * (2 / draws.numel()) ** 0.5
    for limit in (1.0, 2.0, 3.0, 4.0):
        expected = 2 * stats.norm.sf(limit)
        found = float((draws.abs() > limit).double().mean())
        assert abs(found - expected) < 5 * (expected / draws.numel()) ** 0.5


def test_neighbouring_draws_and_items_are_not_correlated() -> None:
    draws = randomness.normal(11, "noise", first=0, shape=(2000, 500)).double()
    for one, two in (
        (draws[:, ::2], draws[:, 1::2]),
        (draws[:-1], draws[1:]),
        (draws[:, 2:], draws[:, :-2]),
    ):
        assert abs(float((one * two).mean())) < 5 / one.numel() ** 0.5
        assert abs(float(((one**2 - 1) * (two**2 - 1)).mean())) < 5 * 2 / one.numel() ** 0.5


@pytest.mark.parametrize("word", [0, 2**64 - 1, 2**63, 2**31])
def test_no_word_of_the_generator_gives_an_infinite_draw(word: int, monkeypatch) -> None:
    monkeypatch.setattr(randomness, "_words", lambda *_: np.full((1, 4), word, dtype=np.uint64))
    assert torch.isfinite(randomness.normal(0, "noise", first=0, shape=(1, 8))).all()
    assert 0 <= float(randomness.uniform(0, "time", first=0, count=1)) < 1


def test_halves_of_a_word_at_the_extremes_are_finite_too(monkeypatch) -> None:
    words = np.array([[-(2**31), 2**31 - 1] * 4], dtype=np.int32).view(np.uint64)
    monkeypatch.setattr(randomness, "_words", lambda *_: words)
    assert torch.isfinite(randomness.normal(0, "noise", first=0, shape=(1, 8))).all()


def test_permutations_depend_on_seed_and_purpose_and_reach_every_place() -> None:
    orders = [
        randomness.permutation(seed, purpose, index=3, size=50).tolist()
        for seed in (0, 1)
        for purpose in ("a", "b")
    ]
    assert len({tuple(order) for order in orders}) == 4
    places = [
        randomness.permutation(0, "plan", index=i, size=8).tolist().index(0) for i in range(4000)
    ]
    assert stats.chisquare([places.count(place) for place in range(8)]).pvalue > 1e-4


def test_seed_and_purpose_do_not_run_together() -> None:
    one, two = (
        randomness.uniform(1, "2x", first=0, count=4),
        randomness.uniform(12, "x", first=0, count=4),
    )
    assert not torch.equal(one, two)


def test_items_of_different_shapes_share_no_draws() -> None:
    """Item 15 as 32 x 32 and item 16 as 24 x 40 once had the same 2,880 values."""
    drawn = [
        randomness.normal(0, "noise", first=first, shape=(4, *shape)).flatten(1)
        for first, shape in (
            (14, (3, 32, 32)),
            (14, (3, 24, 40)),
            (14, (3, 40, 24)),
            (14, (1, 64, 64)),
        )
    ]
    sizes = {values.shape[1] for values in drawn}
    values = {
        size: {float(v) for d in drawn if d.shape[1] == size for v in d[:, :500].flatten()}
        for size in sizes
    }
    for one in sizes:
        for other in sizes - {one}:
            assert len(values[one] & values[other]) < 20  # float32 values may meet by chance


def test_layers_draw_what_they_draw_after_torchs_own_seed() -> None:
    draws = []
    for seed_by in (randomness._seed_stream, torch.manual_seed):
        seed_by(2**40 + 7)
        draws.append(torch.nn.functional.dropout(torch.ones(1000), 0.5))
    assert torch.equal(*draws)


def lowbias32(values: np.ndarray) -> np.ndarray:
    """The published hash, on unsigned numbers."""
    with np.errstate(over="ignore"):
        values ^= values >> np.uint32(16)
        values *= np.uint32(0x7FEB352D)
        values ^= values >> np.uint32(15)
        values *= np.uint32(0x846CA68B)
        values ^= values >> np.uint32(16)
    return values


@pytest.fixture
def unkeyed() -> Iterator[None]:
    yield
    randomness._samples = None


def layer_draws(
    first: int, count: int, shape: tuple[int, ...] = (3, 5), layer: str = "a"
) -> Tensor:
    randomness.key_layers(7, first=first, count=count)
    return drawn((count, *shape), layer)


def drawn(shape: tuple[int, ...], layer: str = "a") -> Tensor:
    return randomness.layer_uniform(randomness.layer_key(layer), shape, torch.device("cpu"))


@pytest.mark.usefixtures("unkeyed")
def test_draws_in_layers_are_those_of_the_published_hash() -> None:
    draws = layer_draws(3, 4)
    words = randomness._words(7, "layers", 3, 4, 1)[:, :1].view(np.uint32)
    key = np.array(randomness.layer_key("a"), np.int32).view(np.uint32)
    with np.errstate(over="ignore"):
        factor, offset = (words[:, :1] ^ key[0]) | np.uint32(1), words[:, 1:] ^ key[1]
        numbers = factor * np.arange(15, dtype=np.uint32) + offset
    expected = (lowbias32(numbers) >> np.uint32(8)) * 2.0**-24
    assert torch.equal(draws.flatten(1), torch.from_numpy(expected).float())


@pytest.mark.usefixtures("unkeyed")
def test_draws_in_layers_belong_to_samples_whatever_the_batch() -> None:
    whole = layer_draws(10, 6)
    parts = torch.cat([layer_draws(10, 1), layer_draws(11, 3), layer_draws(14, 2)])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, layer_draws(10, 6, layer="b"))
    randomness.key_layers(7, first=10, count=3)
    rows = drawn((6, 3, 5))
    assert torch.equal(rows[:3], whole[:3])
    assert not torch.equal(rows[3:], rows[:3])


@pytest.mark.usefixtures("unkeyed")
def test_draws_in_layers_do_not_break_the_graph_of_a_compiled_network() -> None:
    counter = torch._dynamo.testing.CompileCounter()
    key, cpu = randomness.layer_key("a"), torch.device("cpu")
    compiled = torch.compile(
        lambda: randomness.layer_uniform(key, (4, 3, 5), cpu), backend=counter, fullgraph=True
    )
    for first in range(0, 40, 4):
        expected = layer_draws(first, 4)
        assert torch.equal(compiled(), expected)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("unkeyed")
def test_draws_in_layers_are_uniform_and_independent() -> None:
    draws = layer_draws(0, 64, (4096,)).double()
    count = draws.numel()
    assert abs(float(draws.mean()) - 0.5) < 5 / (12 * count) ** 0.5
    counts = torch.histc(draws, 64, 0, 1)
    chi = float(((counts - count / 64) ** 2 / (count / 64)).sum())
    assert 24 < chi < 120  # 63 degrees of freedom
    centred = (draws - 0.5) * 12**0.5
    between = centred @ centred.T / 4096
    between.fill_diagonal_(0)
    assert float(between.abs().max()) < 6 / 4096**0.5
    other = (layer_draws(0, 64, (4096,), "b").double() - 0.5) * 12**0.5
    assert abs(float((centred * other).mean())) < 5 / count**0.5
    for step in (1, 2, 64, 512):  # neighbours in a row, in a column, in a channel
        assert abs(float((centred[:, step:] * centred[:, :-step]).mean())) < 5 / count**0.5
    kept = (draws >= 0.1).double().mean(1)  # not the same number in each sample
    assert 0.5 < float(kept.std()) / (0.09 / 4096) ** 0.5 < 1.5


@pytest.mark.usefixtures("unkeyed")
def test_a_network_on_another_device_than_the_samples_draws_from_torch() -> None:
    randomness.key_layers(7, first=0, count=4)
    draws = randomness.layer_uniform(randomness.layer_key("a"), (4, 3), torch.device("meta"))
    assert draws.device.type == "meta"
