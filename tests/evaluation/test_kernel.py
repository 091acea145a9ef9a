"""The kernel distance: against its double sum, scikit-learn's kernel, and the coverage of its
interval.
"""

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import polynomial_kernel

from sfumato.evaluation.distances import (
    KernelReference,
    compare_kernels,
    kernel_distance,
    kernel_distance_interval,
)


def normal(count: int, size: int, *, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return (
        torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        + shift
    )


def test_it_is_the_sum_over_pairs_written_out() -> None:
    a, b = normal(5, 3), normal(4, 3, seed=1, shift=0.5)

    def k(x, y):
        return float((x @ y / 3 + 1) ** 3)

    inner = np.mean([k(a[i], a[j]) for i in range(5) for j in range(5) if i != j])
    other = np.mean([k(b[i], b[j]) for i in range(4) for j in range(4) if i != j])
    across = np.mean([k(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(inner + other - 2 * across, rel=1e-12)


def test_the_kernel_is_scikit_learns() -> None:
    a, b = normal(30, 8), normal(40, 8, seed=1, shift=0.3)
    inner, other, across = (
        polynomial_kernel(x.numpy(), y.numpy(), degree=3, gamma=1 / 8, coef0=1)
        for x, y in ((a, a), (b, b), (a, b))
    )
    expected = (
        sum((m.sum() - np.trace(m)) / (len(m) * (len(m) - 1)) for m in (inner, other))
        - 2 * across.mean()
    )
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_it_is_unbiased_for_small_sets() -> None:
    found = [
        kernel_distance(normal(10, 4, seed=2 * i), normal(10, 4, seed=2 * i + 1))
        for i in range(400)
    ]
    assert abs(np.mean(found)) < 4 * np.std(found) / 20


def test_the_interval_holds_the_value_and_most_repetitions() -> None:
    reference = normal(300, 6, seed=99)
    values, held = [], 0
    truth = kernel_distance(normal(6000, 6, seed=7, shift=0.3), reference)
    for seed in range(40):
        found = kernel_distance_interval(
            normal(200, 6, seed=seed, shift=0.3), reference, resamples=300
        )
        assert found.low < found.value < found.high
        values.append(found.value)
        held += found.low < truth < found.high
    assert held >= 34
    assert np.std(values) == pytest.approx((found.high - found.low) / 3.92, rel=0.5)


def test_an_interval_is_around_the_same_value() -> None:
    a, b = normal(50, 5), normal(60, 5, seed=1)
    assert kernel_distance_interval(a, b, resamples=20).value == pytest.approx(
        kernel_distance(a, b), rel=1e-9
    )


def test_a_comparison_with_several_references_is_that_with_each() -> None:
    a, references = normal(20, 4), [normal(15, 4, seed=1), normal(30, 4, seed=2, shift=0.4)]
    result = compare_kernels(a, [KernelReference(b, resamples=50) for b in references])
    for estimate, b in zip(result.estimates, references, strict=True):
        assert estimate.value == pytest.approx(kernel_distance(a, b), rel=1e-9)
        assert estimate.low < estimate.high
    difference = result.difference(0, 1)
    values = [estimate.value for estimate in result.estimates]
    assert difference.value == pytest.approx(values[0] - values[1])
    assert difference.value < 0


def test_a_resample_is_the_sum_over_pairs_of_different_images_written_out() -> None:
    a, reference = normal(6, 3), KernelReference(normal(5, 3, seed=1), resamples=4)
    result = compare_kernels(a, [reference], seed=7)
    generator = torch.Generator().manual_seed(7)
    drawn = torch.randint(6, (4, 6), generator=generator)

    def k(x, y):
        return float((x @ y / 3 + 1) ** 3)

    def inner(images, rows):
        pairs = [(i, j) for i in rows for j in rows if i != j]
        return np.mean([k(images[i], images[j]) for i, j in pairs])

    for row, counts, draw in zip(drawn.tolist(), reference.counts, result.draws[0], strict=True):
        others = torch.repeat_interleave(torch.arange(5), counts.long()).tolist()
        b = reference.features
        across = np.mean([k(a[i], b[j]) for i in row for j in others])
        expected = inner(a, row) + inner(b, others) - 2 * across
        assert float(draw) == pytest.approx(expected, rel=1e-9)


def test_the_interval_covers_where_both_sets_are_few() -> None:
    covered = []
    for seed in range(60):
        reference = KernelReference(normal(25, 8, seed=1000 + seed))
        estimate = compare_kernels(normal(40, 8, seed=seed), [reference]).estimates[0]
        covered.append(estimate.low <= 0 <= estimate.high)
    assert np.mean(covered) >= 0.9


def test_two_images_are_enough_for_an_interval() -> None:
    result = compare_kernels(normal(2, 3), [KernelReference(normal(2, 3, seed=1))])
    assert np.isfinite(result.draws.numpy()).all()
