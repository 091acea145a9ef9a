"""The plan is a function of (seed, shapes, step): nothing to save, nothing lost, nothing seen twice
in an epoch (R1).

Here all images have one shape; plans for several are in test_buckets.py.
"""

import numpy as np
import pytest

from sfumato.data import BatchPlan
from sfumato.errors import ConfigError


def planned(*, seed: int, size: int, batch_size: int) -> BatchPlan:
    """A plan for `size` images of one shape."""
    return BatchPlan(seed=seed, shapes=np.zeros(size, np.int64), batch_size=batch_size)


def first(plan: BatchPlan, count: int) -> list[int]:
    return plan.samples(0, count).tolist()


@pytest.mark.parametrize(
    ("size", "batch"), [(100, 10), (100, 7), (5, 64), (1, 3), (64, 64), (2, 1)]
)
def test_every_epoch_is_a_permutation(size: int, batch: int) -> None:
    plan = planned(seed=3, size=size, batch_size=batch)
    assert plan.size == size
    steps = -(-4 * size // batch)
    seen = np.concatenate([plan.batch(step) for step in range(steps)])
    assert all(len(plan.batch(step)) == batch for step in range(steps))
    for epoch in range(4):
        assert sorted(seen[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_epochs_differ_in_their_order() -> None:
    plan = planned(seed=0, size=50, batch_size=50)
    assert plan.batch(0).tolist() != plan.batch(1).tolist()
    assert plan.batch(0).tolist() != list(range(50))


def test_another_seed_is_another_order_and_the_same_seed_is_not() -> None:
    plan = planned(seed=0, size=100, batch_size=10)
    assert first(plan, 250) == first(planned(seed=0, size=100, batch_size=10), 250)
    assert first(plan, 250) != first(planned(seed=1, size=100, batch_size=10), 250)


@pytest.mark.parametrize("batch", [1, 3, 10, 64, 300])
def test_sample_g_does_not_depend_on_the_batch_size(batch: int) -> None:
    plan = planned(seed=7, size=23, batch_size=batch)
    batches = np.concatenate([plan.batch(step) for step in range(-(-300 // batch))])[:300]
    assert batches.tolist() == first(planned(seed=7, size=23, batch_size=5), 300)


def test_a_batch_far_ahead_needs_none_before_it() -> None:
    plan = planned(seed=0, size=1000, batch_size=16)
    far = 10**12
    assert plan.batch(far).tolist() == plan.samples(far * 16, 32)[:16].tolist()
    assert set(plan.batch(far).tolist()) <= set(range(1000))


@pytest.mark.parametrize("ranks", [1, 2, 64])
def test_contiguous_slices_of_ranks_make_up_the_global_batch(ranks: int) -> None:
    size, batch = 640, 128
    plan = planned(seed=2, size=size, batch_size=batch)
    seen: list[int] = []
    for step in range(size // batch):
        slices = [plan.batch(step, rank=rank, ranks=ranks) for rank in range(ranks)]
        assert {len(part) for part in slices} == {batch // ranks}
        assert np.concatenate(slices).tolist() == plan.batch(step).tolist()
        seen += plan.batch(step).tolist()
    assert sorted(seen) == list(range(size))


def test_a_batch_that_does_not_divide_among_the_ranks_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"a batch of 12 images cannot be shared evenly by 5 processes\n.*\[1, 2, 3, 4, 6, 12\]",
    ):
        planned(seed=0, size=100, batch_size=12).batch(0, rank=0, ranks=5)


def test_asking_in_another_order_changes_nothing() -> None:
    plan = planned(seed=5, size=30, batch_size=8)
    forwards = {step: plan.batch(step).tolist() for step in range(40)}
    assert all(plan.batch(step).tolist() == forwards[step] for step in reversed(range(40)))
