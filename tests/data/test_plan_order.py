"""The order of a plan costs the same for any size, is as random as numpy's permutation, and that of
older runs stays.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chi2

from sfumato import randomness
from sfumato.data import BatchPlan
from sfumato.data.members import BLOCK, Members

Order = Callable[[int, int], NDArray[np.int64]]  # of a trial's number and a size


def keyed(rounds: int) -> Order:
    return lambda trial, size: randomness.bijection(
        np.arange(size), np.random.Philox(key=trial).random_raw(rounds), size
    )


def numpys(trial: int, size: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(key=trial)).permutation(size)


def chance(counts: NDArray[np.int64], freedom: int) -> float:
    """The probability of counts as unequal as these, if all are equally likely."""
    expected = counts.mean()
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum(), freedom))


def of_places(order: Order, size: int, trials: int = 4000) -> float:
    """Whether each element comes to each place equally often."""
    counts = np.zeros((size, size), np.int64)
    for trial in range(trials):
        counts[np.arange(size), order(trial, size)] += 1
    return chance(counts, (size - 1) ** 2)


def of_pairs(order: Order, size: int, trials: int = 4000) -> float:
    """Whether each pair of elements follows one another equally often."""
    counts = np.zeros((size, size), np.int64)
    for trial in range(trials):
        found = order(trial, size)
        counts[found[:-1], found[1:]] += 1
    return chance(counts[~np.eye(size, dtype=bool)], size * (size - 1) - 1)


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**32), rounds=st.integers(1, 9))
def test_a_bijection_has_every_element_once(size: int, seed: int, rounds: int) -> None:
    assert sorted(keyed(rounds)(seed, size).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [16, 50])
def test_a_bijection_is_as_uniform_as_numpys_permutation_and_four_rounds_are_not(size: int) -> None:
    for order in (numpys, keyed(randomness.ROUNDS)):
        assert of_places(order, size) > 0.002
        assert of_pairs(order, size) > 0.002
    assert of_pairs(keyed(4), size) < 1e-6


def batches_of_shapes(version: int = 2, trials: int = 3000) -> tuple[float, float]:
    """Whether all pairs of images of a shape meet equally often in a batch, and a shape comes
    equally often to each batch.
    """
    shapes = np.repeat([0, 1], [32, 16])
    met, kinds = np.zeros((48, 48), np.int64), np.zeros(12, np.int64)
    for seed in range(trials):
        plan = BatchPlan(seed=seed, shapes=shapes, batch_size=4, version=version)
        batches = plan.samples(0, 48).reshape(12, 4)
        for batch in batches:
            met[np.ix_(batch, batch)] += 1
        kinds += shapes[batches[:, 0]]
    pairs = met[:32, :32][np.triu_indices(32, 1)]
    return chance(pairs, len(pairs) - 1), chance(kinds, 11)


@pytest.mark.parametrize("most", [0, randomness.MOST_PERMUTED])
def test_images_of_a_shape_meet_equally_often_and_its_batches_come_anywhere(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(randomness, "MOST_PERMUTED", most)
    assert min(batches_of_shapes()) > 0.002


def test_with_four_rounds_some_images_of_a_shape_would_meet_more_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(randomness, "MOST_PERMUTED", 0)
    monkeypatch.setattr(randomness, "ROUNDS", 4)
    assert batches_of_shapes()[0] < 1e-6


def test_a_batch_of_a_billion_images_needs_neither_time_nor_memory() -> None:
    size, batch = 10**9, 256
    shapes = np.broadcast_to(np.uint8(0), size)  # takes one byte
    plan = BatchPlan(seed=0, shapes=shapes, batch_size=batch)
    plan.__dict__["members"] = OneKind(size)
    seen = np.concatenate([plan.batch(10**5 + step) for step in range(40)])
    assert len(np.unique(seen)) == 40 * batch
    assert abs(seen.mean() / size - 0.5) < 0.02


class OneKind:
    """Members of one kind, which are not counted."""

    kinds = np.array([0])

    def __init__(self, size: int) -> None:
        self.counts = np.array([size])

    def part(self, begins: NDArray[np.int64], chosen: NDArray[np.int64]) -> OneKind:
        return self

    def positions(self, number: int, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        return ranks


@settings(max_examples=50, deadline=None)
@given(
    column=st.lists(st.integers(0, 5), min_size=1, max_size=60),
    times=st.sampled_from([1, 3, 200]),
    dtype=st.sampled_from([np.uint8, np.int64]),
)
def test_members_are_found_by_their_rank(column: list[int], times: int, dtype: type) -> None:
    values = np.array(column * times, dtype)
    members = Members(values)
    assert members.kinds.tolist() == sorted(set(column))
    for number, kind in enumerate(members.kinds):
        expected = np.flatnonzero(values == kind)
        assert members.counts[number] == len(expected)
        ranks = np.random.default_rng(0).permutation(len(expected))
        assert members.positions(number, ranks).tolist() == expected[ranks].tolist()


def test_members_span_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfumato.data.members.CHUNK", 2 * BLOCK)
    values = np.random.default_rng(0).integers(0, 3, 9 * BLOCK + 17).astype(np.uint8)
    members = Members(values)
    for number in range(3):
        expected = np.flatnonzero(values == number)
        assert members.positions(number, np.arange(len(expected))).tolist() == expected.tolist()


def test_runs_from_before_keep_their_order() -> None:
    """Written down from the code of that time."""
    shapes = np.array([0, 1, 0, 2, 0, 1, 0, 0, 2, 0, 1, 0, 1, 2, 0])
    plan = BatchPlan(seed=3, shapes=shapes, batch_size=4, version=1)
    assert plan.hash == "c88621e3feb7dc03a0e864768281e3e52e944d22977d9347ffa50336bd2684f0"
    assert plan.samples(0, 34).tolist() == [
        11, 14, 4, 9, 2, 6, 0, 7, 12, 10, 5, 1, 13, 8, 3, 3, 9,
        11, 6, 7, 5, 10, 1, 12, 14, 4, 2, 0, 8, 13, 13, 3, 12, 10,
    ]  # fmt: skip
    assert plan.batch(10**9).tolist() == [2, 9, 7, 6]
    one = BatchPlan(seed=5, shapes=np.zeros(11, np.int64), batch_size=4, begins=3, version=1)
    assert one.hash == "1b627ffa54479691e522112d339c2d18539d379cc593087d859d70d844beec63"
    assert one.samples(0, 20).tolist() == [
        0, 9, 8, 2, 10, 3, 0, 7, 5, 6, 1, 4, 4, 5, 3, 1, 7, 0, 9, 2
    ]  # fmt: skip
