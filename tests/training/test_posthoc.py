"""Averages reconstructed afterwards, against those tracked along the way and against quadrature."""

import numpy as np
import pytest

from sfumato.training.ema import PowerEMA
from sfumato.training.posthoc import Profile, overlap, shares


@pytest.mark.parametrize(("a", "b"), [((7, 3.0), (5, 9.0)), ((5, 9.0), (7, 3.0)), ((4, 6.94), (4, 6.94)), ((1000, 16.97), (300, 6.94))])
def test_overlap_is_the_integral_of_the_product(a: tuple, b: tuple) -> None:
    a, b = Profile(*a), Profile(*b)
    t = (np.arange(2_000_000) + 0.5) / 2_000_000 * min(a.step, b.step)
    dense = [(p.gamma + 1) * t**p.gamma / float(p.step) ** (p.gamma + 1) for p in (a, b)]
    assert overlap(a, b) == pytest.approx(float((dense[0] * dense[1]).mean() * min(a.step, b.step)), rel=1e-6)


def test_an_average_that_was_kept_is_itself() -> None:
    kept = [Profile(step, PowerEMA(sigma).gamma) for step in (250, 500, 1000) for sigma in (0.05, 0.1)]
    assert np.allclose(shares(kept, kept[3]), np.eye(6)[3], atol=1e-6)


@pytest.mark.parametrize("sigma", [0.06, 0.08, 0.15, 0.2])
def test_a_reconstructed_average_is_the_tracked_one(sigma: float) -> None:
    """Weights on a random walk with drift, as training's are; all averages tracked step by step."""
    steps, every = 4_000, 250
    rng = np.random.default_rng(0)
    weights = np.cumsum(rng.normal(0, 0.02, (steps, 50)), axis=0) + np.linspace(0, 1, steps)[:, None] + rng.normal(0, 1, 50)
    profiles = {width: PowerEMA(width) for width in (0.05, 0.1, sigma)}
    averages = {width: np.zeros(50) for width in profiles}
    kept: list[Profile] = []
    values: list[np.ndarray] = []
    for step in range(1, steps + 1):
        for width, profile in profiles.items():
            averages[width] += (1 - profile.decay(step)) * (weights[step - 1] - averages[width])
        if step % every == 0:
            for width in (0.05, 0.1):
                kept.append(Profile(step, profiles[width].gamma))
                values.append(averages[width].copy())
    made = shares(kept, Profile(steps, profiles[sigma].gamma)) @ np.array(values)
    scale = np.sqrt((averages[sigma] ** 2).mean())
    assert np.sqrt(((made - averages[sigma]) ** 2).mean()) / scale < 1e-2
