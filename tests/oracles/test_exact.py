"""The oracles themselves: what judges the samplers is checked by quadrature and by a
general-purpose ODE solver.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from sfumato.diffusion import EmpiricalDenoiser, Linear, NoiseLevel, Velocity
from tests.oracles.exact import ORACLES, Gaussian, Mixture

X = torch.linspace(-2.0, 2.5, 7, dtype=torch.float64)


def level(t: float) -> NoiseLevel:
    return Linear()(torch.tensor(t, dtype=torch.float64))


def density(oracle, x0: np.ndarray) -> np.ndarray:
    means, weights = (
        ([oracle.mean], [1.0]) if isinstance(oracle, Gaussian) else (oracle.means, oracle.weights)
    )
    return sum(
        w * np.exp(-((x0 - m) ** 2) / (2 * oracle.variance))
        for m, w in zip(means, weights, strict=True)
    )


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("name", ORACLES)
def test_posterior_mean_is_the_integral(name: str, t: float) -> None:
    oracle, at, x0 = ORACLES[name], level(t), np.linspace(-9, 9, 20_001)
    likelihood = np.exp(
        -((X.numpy()[:, None] - float(at.alpha) * x0) ** 2) / (2 * float(at.sigma) ** 2)
    )
    joint = likelihood * density(oracle, x0)
    found = oracle(X, at)
    np.testing.assert_allclose(found.x0.numpy(), (joint * x0).sum(1) / joint.sum(1), rtol=1e-10)
    torch.testing.assert_close(at.mix(*found), X)


@pytest.mark.parametrize("name", ORACLES)
def test_exact_map_solves_the_sampling_ode(name: str) -> None:
    oracle, p, start, stop = ORACLES[name], Velocity(), level(0.9), level(0.1)

    def slope(coordinate: float, y: np.ndarray) -> np.ndarray:
        at, x = p.level(torch.tensor(coordinate, dtype=torch.float64)), torch.from_numpy(y)
        return p.target(oracle(x, at), at).numpy()

    span = [float(p.coordinate(at)) for at in (start, stop)]
    solved = solve_ivp(
        slope, span, (X / p.scale(start)).numpy(), method="DOP853", rtol=1e-11, atol=1e-12
    ).y[:, -1]
    np.testing.assert_allclose(
        oracle.flow(X, start, stop).numpy(), solved * float(p.scale(stop)), atol=1e-9
    )


def test_a_mixture_of_points_is_the_empirical_denoiser() -> None:
    narrow = Mixture(variance=0.0, weights=(0.5, 0.5))
    points = EmpiricalDenoiser(torch.tensor(narrow.means, dtype=torch.float64).view(2, 1))
    torch.testing.assert_close(
        points(X.view(-1, 1), level(0.4)).x0.flatten(), narrow(X, level(0.4)).x0
    )
