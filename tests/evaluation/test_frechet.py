"""The Fréchet distance against its closed form and against scipy's matrix square root."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from sfumato.evaluation.distances import frechet_distance, frechet_interval


def normal(count: int, size: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(
        count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def exactly(
    count: int, mean: torch.Tensor, covariance: torch.Tensor, *, seed: int = 0
) -> torch.Tensor:
    """Features whose sample mean and covariance are the given ones, to rounding."""
    x = normal(count, len(mean), seed=seed)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False)
    return (torch.linalg.cholesky(covariance) @ white).T + mean


def with_scipy(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double().numpy(), b.double().numpy()
    left, right = np.cov(a.T), np.cov(b.T)
    root = sqrtm(left @ right)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(left + right - 2 * root.real))


@pytest.mark.parametrize(
    ("shift", "s", "t"), [(0.0, 1.0, 1.0), (3.0, 1.0, 1.0), (0.0, 1.0, 2.5), (1.5, 0.2, 4.0)]
)
def test_isotropic_gaussians_have_a_closed_form(shift: float, s: float, t: float) -> None:
    size, eye = 5, torch.eye(5, dtype=torch.float64)
    a = exactly(200, torch.zeros(size, dtype=torch.float64), s**2 * eye)
    b = exactly(300, torch.full((size,), shift, dtype=torch.float64), t**2 * eye, seed=1)
    assert frechet_distance(a, b) == pytest.approx(size * (shift**2 + (s - t) ** 2), abs=1e-9)


def test_in_one_dimension_it_is_the_difference_of_means_and_deviations() -> None:
    a, b = 2 * normal(50, 1), 3 + 0.5 * normal(70, 1, seed=1)
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert frechet_distance(a, b) == pytest.approx(float(expected), abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_correlated_features_agree_with_scipy(seed: int) -> None:
    mixing = normal(12, 12, seed=100 + seed)
    a, b = normal(80, 12, seed=seed) @ mixing, normal(60, 12, seed=50 + seed) @ mixing.flip(0) + 0.3
    assert frechet_distance(a, b) == pytest.approx(with_scipy(a, b), rel=1e-6)


def test_features_that_span_less_than_the_space_stay_finite() -> None:
    a, b = normal(400, 3) @ normal(3, 20, seed=5), normal(300, 3, seed=1) @ normal(3, 20, seed=6)
    value = frechet_distance(a, b)
    regularized = frechet_distance(
        a + 1e-6 * normal(400, 20, seed=7), b + 1e-6 * normal(300, 20, seed=8)
    )
    assert math.isfinite(value)
    assert value == pytest.approx(regularized, rel=1e-3)
    assert value > 1


def test_identical_sets_are_at_distance_zero() -> None:
    a = normal(100, 16)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 0.01) > 1e-4


def test_neither_the_order_of_images_nor_of_the_sets_matters() -> None:
    a, b = normal(90, 8), 1.3 * normal(70, 8, seed=1) + 0.2
    value = frechet_distance(a, b)
    assert frechet_distance(
        a.flip(0), b[torch.randperm(70, generator=torch.Generator().manual_seed(0))]
    ) == pytest.approx(value, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(value, rel=1e-8)


def test_a_rotation_of_the_feature_space_does_not_matter() -> None:
    a, b = normal(90, 8), 1.3 * normal(70, 8, seed=1) + 0.2
    rotation = torch.linalg.qr(normal(8, 8, seed=3))[0]
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(
        frechet_distance(a, b), rel=1e-8
    )


def test_single_precision_features_are_summed_in_double() -> None:
    a, b = normal(90, 8) + 1000, normal(70, 8, seed=1) + 1000
    assert frechet_distance(a.float(), b.float()) == pytest.approx(frechet_distance(a, b), rel=1e-3)


def test_the_interval_is_as_wide_as_repetitions_are_apart() -> None:
    reference = normal(2000, 4, seed=99)
    found = [frechet_interval(normal(300, 4, seed=seed) + 0.5, reference) for seed in range(30)]
    spread = torch.tensor([one.value for one in found]).std()
    widths = torch.tensor([one.high - one.low for one in found])
    assert float(widths.mean() / 3.92 / spread) == pytest.approx(1, abs=0.4)
    assert found[0].value == frechet_distance(normal(300, 4) + 0.5, reference)
