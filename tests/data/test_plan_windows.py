"""A plan that takes the shards of a set in windows: each image once an epoch, each shard in one window."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chi2

from sfumato.data import BatchPlan


def plan_of(
    sizes: list[int], *, window: int, batch_size: int = 4, seed: int = 0, kinds: int = 1
) -> BatchPlan:
    """A plan of shards of some sizes, with images of several shapes."""
    size = sum(sizes)
    return BatchPlan(
        seed=seed,
        shapes=np.random.default_rng(1).integers(kinds, size=size),
        batch_size=batch_size,
        shards=np.cumsum([0, *sizes[:-1]]),
        window=window,
    )


def shard_of(plan: BatchPlan, samples: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.searchsorted(plan.shards, samples, side="right") - 1


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    window=st.integers(0, 14),
    batch_size=st.integers(1, 20),
    seed=st.integers(0, 2**32),
    kinds=st.integers(1, 3),
)
def test_each_image_comes_once_in_an_epoch_and_shards_come_in_their_windows(
    sizes: list[int], window: int, batch_size: int, seed: int, kinds: int
) -> None:
    plan = plan_of(sizes, window=window, batch_size=batch_size, seed=seed, kinds=kinds)
    for epoch in (0, 1, 7):
        samples = plan.samples(epoch * plan.size, plan.size)
        assert sorted(samples.tolist()) == list(range(plan.size))
        shards, begin = plan.upcoming(epoch * plan.size, 12), 0
        for chosen in shards[: -(-len(sizes) // (window or len(sizes)))]:
            end = begin + sum(sizes[shard] for shard in chosen)
            assert set(shard_of(plan, samples[begin:end])) == set(chosen.tolist())
            assert len(chosen) <= (window or len(sizes))
            begin = end
        assert begin == plan.size
    whole = plan.samples(0, 3 * plan.size)
    for first in range(0, plan.size, 7):  # whatever was asked for before
        count = min(5, len(whole) - first)
        assert (plan.samples(first, count) == whole[first : first + count]).all()


def test_images_of_one_shape_come_in_batches_within_a_window() -> None:
    plan = plan_of([40] * 6, window=2, batch_size=8, kinds=2)
    mixed = [
        len(set(plan.shapes[plan.batch(step)].tolist())) > 1 for step in range(3 * plan.size // 8)
    ]
    assert sum(mixed) <= 2 * 9  # at the ends of nine windows


@pytest.mark.parametrize("window", [0, 6, 100])
def test_a_window_of_all_shards_is_the_order_without(window: int) -> None:
    plain = BatchPlan(seed=3, shapes=plan_of([5] * 6, window=0).shapes, batch_size=4)
    plan = plan_of([5] * 6, window=window, seed=3)
    assert (plan.samples(0, 90) == plain.samples(0, 90)).all()
    assert plan.hash == plain.hash


def test_the_hash_tells_windows_and_shards_apart() -> None:
    plans = [
        plan_of([5] * 6, window=0),
        plan_of([5] * 6, window=2),
        plan_of([5] * 6, window=3),
        plan_of([10] * 3, window=2),
    ]
    assert len({plan.hash for plan in plans}) == len(plans)


def test_windows_are_filled_and_mixed_at_random() -> None:
    """Each shard comes equally often to each window, each two equally often to the same one, and each
    image equally often to each place of its window.
    """
    shards, pairs, places = np.zeros((6, 3)), np.zeros((6, 6)), np.zeros((6, 12))
    trials = 3000
    for seed in range(trials):
        plan = plan_of([6] * 6, window=2, seed=seed)
        samples = plan.samples(0, 36)
        for number, chosen in enumerate(plan.upcoming(0, 3)):
            shards[chosen, number] += 1
            pairs[np.ix_(chosen, chosen)] += 1
            inside = samples[12 * number : 12 * number + 12]
            first = inside // 6 == min(chosen)
            places[inside[first] % 6, np.flatnonzero(first)] += 1
    for counts, freedom in (
        (shards.reshape(-1), 10), (pairs[~np.eye(6, dtype=bool)], 9), (places.reshape(-1), 55)
    ):  # fmt: skip
        expected = counts.mean()
        scale = 2 if counts is not shards and len(counts) == 30 else 1  # each pair is counted twice
        statistic = ((counts - expected) ** 2 / expected).sum() / scale
        assert chi2.sf(statistic, freedom) > 0.002
    control = np.array([np.bincount(plan_of([6] * 6, window=2, seed=seed).upcoming(0, 1)[0], minlength=6)
                        for seed in [1] * 300]).sum(0)  # fmt: skip
    assert chi2.sf(((control - 100) ** 2 / 100).sum(), 5) < 1e-6  # one seed for all


def test_processes_share_the_batches_of_a_window() -> None:
    plan = plan_of([7] * 5, window=2, batch_size=6)
    for step in range(20):
        parts = [plan.batch(step, rank=rank, ranks=3) for rank in range(3)]
        assert (np.concatenate(parts) == plan.batch(step)).all()


def test_a_window_far_ahead_of_a_large_set_is_found_at_once() -> None:
    plan = BatchPlan(
        seed=0, shapes=np.zeros(50_000_000, np.uint8), batch_size=256,
        shards=np.arange(0, 50_000_000, 10_000), window=16,
    )  # fmt: skip
    batch = plan.batch(10**6)
    assert len(set(shard_of(plan, batch).tolist())) <= 16
    assert set(shard_of(plan, batch)) <= set(plan.upcoming(256 * 10**6, 1)[0].tolist())
