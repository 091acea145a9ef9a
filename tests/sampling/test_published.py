"""Samplers against the formulas of their papers, written out in the papers' own variables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sfumato.diffusion import Epsilon, Karras, Linear, LinearBetas, NoiseLevel
from sfumato.sampling import DDIM, KeyedNoise, Multistep, UniPC, sample
from tests.oracles.exact import Mixture

X = torch.linspace(-1.5, 1.5, 9, dtype=torch.float64)
GRIDS = {
    "karras": Karras(sigma_min=0.05, sigma_max=20.0)(torch.linspace(1, 0, 13, dtype=torch.float64)),
    "linear": Linear()(torch.linspace(0.95, 0.05, 13, dtype=torch.float64)),
}


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_is_equation_12_with_16(eta: float) -> None:
    """In alpha-bar, with the paper's sigma_t(eta); eta = 1 is DDPM's posterior variance."""
    levels = LinearBetas()(torch.tensor([0.9, 0.6, 0.4, 0.1], dtype=torch.float64))
    ours = sample(DDIM(eta), Mixture(), X, levels, noise=KeyedNoise(2))
    x, noise = X, KeyedNoise(2)
    for start, stop in levels.steps():
        bar, bar_next = start.alpha**2, stop.alpha**2
        x0, eps = Mixture()(x, start)
        deviation = eta * torch.sqrt((1 - bar_next) / (1 - bar)) * torch.sqrt(1 - bar / bar_next)
        x = torch.sqrt(bar_next) * x0 + torch.sqrt(1 - bar_next - deviation**2) * eps
        x = x + deviation * noise(x) if eta else x
    torch.testing.assert_close(ours, x)


def unipc(p: int, levels: NoiseLevel, x: torch.Tensor) -> torch.Tensor:
    """UniPC-p (Zhao et al. 2023, algorithms 1 and 2; data prediction, B(h) = e^h - 1), every linear
    system solved.
    """
    alpha, sigma = levels
    logs, kept, came_from = torch.log(alpha / sigma), [], None

    def system(rks: list[float], h: float) -> np.ndarray:
        phi, factorial, right = math.expm1(-h) / -h - 1, 1.0, []
        for i in range(1, len(rks) + 1):
            right.append(phi * factorial / math.expm1(-h))
            factorial *= i + 1
            phi = phi / -h - 1 / factorial
        return (
            np.linalg.solve(
                np.array([[r**k for r in rks] for k in range(len(rks))]), np.array(right)
            )
            if rks
            else np.zeros(0)
        )

    def move(x, i, newest=None):
        """From level i - 1 to i; with the evaluation at i it is the corrector."""
        points = kept[-p:] if newest is None else kept[-p - 1 : -1]
        (j0, m0), earlier = points[-1], points[:-1]
        h = float(logs[i] - logs[j0])
        rks = [float(logs[j] - logs[j0]) / h for j, _ in earlier]
        slopes = [(m - m0) / r for (_, m), r in zip(earlier, rks, strict=True)]
        if newest is not None:
            rks, slopes = [*rks, 1.0], [*slopes, newest - m0]
        total = sum(
            (rho * s for rho, s in zip(system(rks, h), slopes, strict=True)),
            start=torch.zeros_like(x),
        )
        return sigma[i] / sigma[j0] * x - alpha[i] * math.expm1(-h) * (m0 + total)

    for i in range(len(alpha) - 1):
        m = Mixture()(x, levels.at(i)).x0
        kept.append((i, m))
        if came_from is not None:
            x = move(came_from, i, newest=m)
        came_from, x = x, move(x, i + 1)
    return x


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("p", [1, 2, 3])
def test_unipc_is_the_published_algorithm(p: int, grid: str) -> None:
    levels = GRIDS[grid]
    x = X * torch.hypot(*levels.at(0))
    torch.testing.assert_close(
        sample(UniPC(p + 1), Mixture(), x, levels), unipc(p, levels, x), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("order", [2, 3, 4])
def test_adams_bashforth_on_even_sigmas_has_the_textbook_weights(order: int) -> None:
    weights = {
        1: (1,),
        2: (3 / 2, -1 / 2),
        3: (23 / 12, -16 / 12, 5 / 12),
        4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
    }
    sigmas = torch.linspace(4, 0.2, 20, dtype=torch.float64)
    levels = NoiseLevel(torch.ones_like(sigmas), sigmas)
    sampler = Multistep(order, parameterization=Epsilon(), exponential=False)
    x, slopes = 4 * X, []
    for start, stop in levels.steps():
        slopes.insert(0, Mixture()(x, start).eps)
        used = weights[min(order, len(slopes))]
        x = x + (stop.sigma - start.sigma) * sum(
            w * slope for w, slope in zip(used, slopes, strict=False)
        )
    torch.testing.assert_close(sample(sampler, Mixture(), 4 * X, levels), x)
