"""Keyed draws: item i is a function of (seed, purpose, i)."""

import pytest
import torch
from scipy import stats

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
