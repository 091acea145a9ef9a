"""The share of good samples and of variety: against brute force, and on sets whose shares are
known.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sfumato.evaluation.coverage import RealImages, expected_filling


def normal(count: int, *, seed: int, dimensions: int = 6) -> torch.Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed)).double()


def by_brute_force(real: np.ndarray, samples: np.ndarray, k: int) -> tuple[float, float]:
    """Clipped density over that of real images, and how full the balls are."""
    real, samples = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (real, samples))
    radii = []
    for i, centre in enumerate(real):
        others = [np.linalg.norm(centre - x) for j, x in enumerate(real) if j != i]
        radii.append(sorted(others)[k - 1])
    median = sorted(radii)[(len(radii) - 1) // 2]  # the lower one, as torch has it
    clipped = np.minimum(radii, median)

    def density(x: np.ndarray, *, leave_out: int | None = None) -> float:
        inside = sum(
            np.linalg.norm(x - centre) <= radius
            for i, (centre, radius) in enumerate(zip(real, clipped, strict=True))
            if i != leave_out
        )
        return min(1.0, inside / k)

    own = np.mean([density(x, leave_out=i) for i, x in enumerate(real)])
    good = np.mean([density(x) for x in samples]) / own
    full = [
        min(1.0, sum(np.linalg.norm(x - centre) <= radius for x in samples) / k)
        for centre, radius in zip(real, radii, strict=True)
    ]
    return min(1.0, good), float(np.mean(full))


def test_the_shares_are_those_of_brute_force() -> None:
    real, samples = normal(60, seed=0), 0.5 * normal(40, seed=1) + 0.8
    good, full = by_brute_force(real.numpy(), samples.numpy(), 5)
    result = RealImages(real).measure(samples)
    assert result.good.value == pytest.approx(good, abs=1e-9)
    assert result.variety.value < 1
    expected = expected_filling(60, 40)
    assert np.interp(result.variety.value, np.linspace(0, 1, 41), expected) == pytest.approx(
        full, abs=1e-9
    )


def test_how_full_balls_are_with_real_images_is_that_of_a_simulation() -> None:
    rng, full = np.random.default_rng(0), []
    for _ in range(400):
        real, samples = rng.uniform(size=30), rng.uniform(size=20)
        distances = np.abs(real[:, None] - real)
        radii = np.sort(distances, axis=1)[:, 5]
        inside = (np.abs(real[:, None] - samples) <= radii[:, None]).sum(1)
        full.append(np.minimum(1, inside / 5).mean())
    expected = expected_filling(30, 20)
    assert expected[0] == 0
    assert (np.diff(expected) > 0).all()
    assert np.mean(full) == pytest.approx(expected[-1], abs=4 * np.std(full) / 20)


@pytest.mark.parametrize(("bad", "share"), [(0, 1.0), (200, 0.5), (300, 0.25), (400, 0.0)])
def test_samples_that_are_bad_lower_both_shares_by_as_much(bad: int, share: float) -> None:
    """Those that are good cover as much variety as so many real images would."""
    far = torch.zeros(400, 6).double()
    real = normal(600, seed=2).abs()  # in one corner
    samples = normal(400, seed=3).abs()
    far[:, 0] = -1
    samples[:bad] = far[:bad] + 0.01 * normal(400, seed=4)[:bad]
    result = RealImages(real).measure(samples)
    assert result.good.value == pytest.approx(share, abs=0.08)
    assert result.variety.value == pytest.approx(share, abs=0.08)
    assert result.good.low <= result.good.value <= result.good.high
    assert result.variety.low - 1e-9 <= share <= result.variety.high + 0.03


def test_few_images_over_and_over_are_good_without_variety() -> None:
    real = normal(600, seed=5)
    samples = normal(4, seed=6).repeat(100, 1)
    result = RealImages(real).measure(samples)
    assert result.variety.high < 0.15


def test_the_order_of_samples_does_not_matter_for_the_shares() -> None:
    real, samples = RealImages(normal(100, seed=7)), normal(80, seed=8)
    one, other = real.measure(samples), real.measure(samples.flip(0))
    assert one.good.value == pytest.approx(other.good.value, abs=1e-12)
    assert one.variety.value == pytest.approx(other.variety.value, abs=1e-12)


def test_no_more_images_than_neighbours_are_refused() -> None:
    with pytest.raises(ValueError, match="5 images, and 5 neighbours"):
        RealImages(normal(5, seed=0))


def test_the_interval_of_variety_covers_that_of_new_real_images() -> None:
    covered = []
    for seed in range(40):
        real = RealImages(normal(150, seed=100 + seed))
        variety = real.measure(normal(120, seed=500 + seed)).variety
        covered.append(variety.low <= 1.0 <= variety.high)
    assert np.mean(covered) >= 0.85
