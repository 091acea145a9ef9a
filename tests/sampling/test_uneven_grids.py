"""The order of samplers where steps differ in length, in log-SNR too: rules that look back must know by how
much.

On a grid that is even in log-SNR every ratio of steps is 1, and a wrong power of it cannot be seen.
"""

from __future__ import annotations

import itertools
from collections import deque

import numpy as np
import pytest
import torch

from sfumato.diffusion import (
    Epsilon,
    Flow,
    Karras,
    Linear,
    NoiseLevel,
    Sample,
    UniformLogSNR,
    Velocity,
)
from sfumato.sampling import DPMSolverPP2M, KeyedNoise, Multistep, Point, UniPC, sample
from tests.oracles.exact import Gaussian, Mixture

X = torch.special.ndtri(torch.linspace(0.05, 0.95, 16, dtype=torch.float64))
LOOK_BACK = {
    "DPM-Solver++(2M)": DPMSolverPP2M(),
    **{f"UniPC{k}": UniPC(k) for k in (2, 3, 4)},
    **{
        f"AB{k}/{p}": Multistep(k, parameterization=p, exponential=False)
        for k in (2, 3, 4)
        for p in (Flow(), Velocity(0.5))
    },
    **{
        f"exp{k}/{p}": Multistep(k, parameterization=p)
        for k in (2, 3, 4)
        for p in (Epsilon(), Sample())
    },
}


def linear(steps: int) -> NoiseLevel:
    return Linear()(torch.linspace(0.85, 0.08, steps + 1, dtype=torch.float64))


def alternating(steps: int) -> NoiseLevel:
    """Every second step is twice as long in log-SNR."""
    ends = torch.tensor([1.0, 2.0], dtype=torch.float64).repeat(steps // 2).cumsum(0) / (
        1.5 * steps
    )
    return UniformLogSNR(logsnr_min=-3.0, logsnr_max=5.0)(torch.cat([torch.ones(1), 1 - ends]))


def measured_order(sampler, grid, steps=(80, 160, 320)) -> float:
    """From exact starting values: the first three steps are walked along the solution."""
    errors, oracle = [], Mixture()
    for count in steps:
        levels, history = grid(count), deque(maxlen=4)
        start = levels.at(0)
        x = first = torch.hypot(start.alpha, start.sigma) * X
        for number, (a, b) in enumerate(levels.steps()):
            before, x = x, sampler.step(oracle, x, a, b, history, KeyedNoise(0))
            if number < 3:
                x = oracle.flow(first, start, b)
                # remembers states, which it corrected with too few points
                if isinstance(sampler, UniPC):
                    history[0] = history[0]._replace(y=before / a.sigma)
        errors.append(float((x - oracle.flow(first, start, levels.at(-1))).square().mean().sqrt()))
    return float(-np.polyfit(np.log(steps), np.log(errors), 1)[0])


@pytest.mark.parametrize("grid", [linear, alternating])
@pytest.mark.parametrize("name", LOOK_BACK)
def test_order_is_the_declared_one(name: str, grid) -> None:
    assert measured_order(LOOK_BACK[name], grid) == pytest.approx(LOOK_BACK[name].order, abs=0.15)


class EvenSteps:
    """DPM-Solver++(2M) that believes all steps to be as long as this one."""

    def step(self, denoise, x, start, stop, history, noise):
        shifted = list(history)
        if shifted:
            ratio = (
                (start.logsnr() - shifted[0].level.logsnr()) / (stop.logsnr() - start.logsnr())
            ).item()
            here = denoise(x, start).x0
            shifted[0] = shifted[0]._replace(target=here + ratio * (shifted[0].target - here))
        lookback = deque(shifted, maxlen=4)
        moved = DPMSolverPP2M().step(denoise, x, start, stop, lookback, noise)
        history.appendleft(lookback[0])
        return moved


class StartSigma:
    """Adams-Bashforth in `Velocity` that scales its increment with the start's sigma: a defect
    shipped in a public library.
    """

    def step(self, denoise, x, start, stop, history, noise):
        right = Multistep(2, parameterization=Velocity(), exponential=False).step(
            denoise, x, start, stop, history, noise
        )
        kept = torch.hypot(stop.alpha, stop.sigma) / torch.hypot(start.alpha, start.sigma) * x
        return kept + (right - kept) * torch.hypot(stop.alpha, start.sigma) / torch.hypot(
            stop.alpha, stop.sigma
        )


@pytest.mark.parametrize(("sampler", "wrong"), [(EvenSteps(), 1.0), (StartSigma(), 1.0)])
def test_negative_control_a_wrong_rule_measures_another_order(sampler, wrong: float) -> None:
    assert measured_order(sampler, alternating) == pytest.approx(wrong, abs=0.15)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_dpm_solver_2m_is_the_published_formula_on_the_karras_grid(eta: float) -> None:
    """k-diffusion's `sample_dpmpp_2m_sde` ("midpoint"), which at eta = 0 is its `sample_dpmpp_2m`;
    r differs at each step.
    """
    oracle = Mixture()
    sigmas = Karras(sigma_min=0.05, sigma_max=30.0)(
        torch.linspace(1, 0, 15, dtype=torch.float64)
    ).sigma
    ours = sample(
        DPMSolverPP2M(eta),
        oracle,
        30 * X,
        NoiseLevel(torch.ones_like(sigmas), sigmas),
        noise=KeyedNoise(1),
    )
    x, noise, old, last = 30 * X, KeyedNoise(1), None, None
    for sigma, after in itertools.pairwise(sigmas):
        denoised, h = (
            oracle(x, NoiseLevel(torch.ones_like(sigma), sigma)).x0,
            torch.log(sigma / after),
        )
        share = -torch.expm1(-h - eta * h)
        x = after / sigma * torch.exp(-eta * h) * x + share * denoised
        if old is not None:
            r = last / h
            assert abs(r - 1) > 0.01
            x = x + 0.5 * share * (1 / r) * (denoised - old)
        if eta:
            x = x + after * torch.sqrt(-torch.expm1(-2 * eta * h)) * noise(x)
        old, last = denoised, h
    torch.testing.assert_close(ours, x)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_sde_dpm_solver_keeps_the_marginal_in_the_limit(eta: float) -> None:
    """On Gaussian data a step is affine in (x, the last guess, the noise); mean and
    covariance follow it.
    """
    oracle = Gaussian()

    def gap(steps: int) -> tuple[float, float]:
        levels = linear(steps)
        a = levels.at(0)
        mean, covariance, before = (
            np.array([float(a.alpha) * 0.7, 0.0]),
            np.diag([float(a.alpha**2 * 0.25 + a.sigma**2), 0]),
            None,
        )
        for start, stop in levels.steps():

            def step(
                x: float, guess: float, z: float, start=start, stop=stop, before=before
            ) -> np.ndarray:
                value, old = (torch.tensor([v], dtype=torch.float64) for v in (x, guess))
                history = deque([] if before is None else [Point(before, old, old)], maxlen=4)
                moved = DPMSolverPP2M(eta).step(
                    oracle, value, start, stop, history, lambda v: torch.full_like(v, z)
                )
                return np.array([float(moved), float(history[0].target)])

            shift = step(0, 0, 0)
            matrix = np.stack([step(1, 0, 0) - shift, step(0, 1, 0) - shift], axis=1)
            noise = step(0, 0, 1) - shift
            mean, covariance = (
                matrix @ mean + shift,
                matrix @ covariance @ matrix.T + np.outer(noise, noise),
            )
            before = start
        b = levels.at(-1)
        return mean[0] - float(b.alpha) * 0.7, covariance[0, 0] - float(
            b.alpha**2 * 0.25 + b.sigma**2
        )

    coarse, fine = gap(40), gap(320)
    assert abs(fine[0]) < 1e-9
    assert abs(fine[1]) < abs(coarse[1]) / 7
    assert abs(fine[1]) < 2e-3
