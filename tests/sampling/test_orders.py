"""Every sampler's measured order is the one that it declares, on two exact
denoisers.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from sfumato.diffusion import Epsilon, Flow, NoiseLevel, Sample, UniformLogSNR, Velocity
from sfumato.sampling import (
    DDIM,
    SAMPLERS,
    Churn,
    DPMSolverPP2M,
    KeyedNoise,
    Multistep,
    RungeKutta,
    UniPC,
)
from tests.oracles.exact import ORACLES

SCHEDULE = UniformLogSNR(logsnr_min=-3.0, logsnr_max=5.0)
QUANTILES = torch.special.ndtri(torch.linspace(0.04, 0.96, 24, dtype=torch.float64))
PARAMETERIZATIONS = [Epsilon(), Sample(), Flow(), Velocity(1.0), Velocity(0.5)]
DETERMINISTIC = {
    "DDIM": DDIM(),
    "DPM-Solver++(2M)": DPMSolverPP2M(),
    **{f"UniPC{k}": UniPC(k) for k in (2, 3, 4)},
    **{
        f"{m}/{p}": RungeKutta(m, parameterization=p)
        for m in ("euler", "midpoint", "heun", "rk4")
        for p in PARAMETERIZATIONS
    },
    **{
        f"AB{k}/{p}": Multistep(k, parameterization=p, exponential=False)
        for k in (2, 3, 4)
        for p in PARAMETERIZATIONS
    },
    **{
        f"exp{k}/{p}": Multistep(k, parameterization=p)
        for k in (2, 3, 4)
        for p in (Epsilon(), Sample())
    },
    **{
        f"churn/{m}": Churn(RungeKutta(m, parameterization=Epsilon()), gamma=0.0)
        for m in ("heun", "rk4")
    },
}


def error(sampler, oracle, steps: int, warm: bool = True) -> float:
    """RMS error at the end. A warm start walks the first steps along the exact solution, so that
    the history is exact.
    """
    levels = SCHEDULE(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    pairs = list(levels.steps())
    start = levels.at(0)
    x = first = torch.hypot(start.alpha * 0.5, start.sigma) * QUANTILES
    history: deque = deque(maxlen=4)
    for number, (a, b) in enumerate(pairs):
        before, x = x, sampler.step(oracle, x, a, b, history, KeyedNoise(0))
        if warm and number < 3:
            x = oracle.flow(first, start, b)
            # its history holds states too, which it has corrected with too few points yet
            if isinstance(sampler, UniPC):
                history[0] = history[0]._replace(y=before / a.sigma)
    return float((x - oracle.flow(first, start, levels.at(-1))).square().mean().sqrt())


def measured_order(sampler, oracle, steps=(100, 200), warm: bool = True) -> float:
    errors = [error(sampler, oracle, n, warm) for n in steps]
    return float(-np.polyfit(np.log(steps), np.log(errors), 1)[0])


# On Gaussian data the exact solution is sqrt(c^2 + v) up to constants, and the leading error of the
# midpoint rule in a
# projective coordinate, g''/8 + g'g/4 - y'''/6 with g = c/(c^2 + v), vanishes identically: one
# order more than declared.
SUPERCONVERGENT = {(f"midpoint/{p}", "gaussian"): 3 for p in (Epsilon(), Sample(), Flow())}


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_is_the_declared_one(name: str, oracle: str) -> None:
    sampler = DETERMINISTIC[name]
    expected = SUPERCONVERGENT.get((name, oracle), sampler.order)
    # orders are whole numbers; at 100 steps the error is not yet all of its leading term
    assert measured_order(sampler, ORACLES[oracle]) == pytest.approx(expected, abs=0.25)


def test_every_sampler_has_its_order_measured() -> None:
    measured = {type(sampler) for sampler in DETERMINISTIC.values()}
    assert {type(sampler) for sampler in SAMPLERS.values()} <= measured


def test_cold_start_caps_a_multistep_trajectory_at_two() -> None:
    sampler = Multistep(3, parameterization=Velocity(1.0), exponential=False)
    assert measured_order(sampler, ORACLES["mixture"], warm=False) == pytest.approx(2, abs=0.25)


@dataclass(frozen=True)
class WrongAlpha:
    """DDIM with the start's alpha: a defect shipped in a public library."""

    order = 1

    def step(self, denoise, x, start, stop, history, noise):
        x0, eps = denoise(x, start)
        return start.alpha * x0 + stop.sigma * eps


@dataclass(frozen=True)
class WrongSigma:
    """DPM-Solver++(2M) that extrapolates by the wrong ratio of steps."""

    order = 2

    def step(self, denoise, x, start, stop, history, noise):
        before = list(history)
        moved = DPMSolverPP2M().step(denoise, x, start, stop, history, noise)
        if not before:
            return moved
        extra = (history[0].target - before[0].target) / 2
        return moved + 0.5 * (stop.alpha - start.alpha * stop.sigma / start.sigma) * extra


@pytest.mark.parametrize(("sampler", "wrong"), [(WrongAlpha(), 0.0), (WrongSigma(), 1.0)])
def test_negative_control_a_wrong_rule_measures_another_order(sampler, wrong: float) -> None:
    assert measured_order(sampler, ORACLES["mixture"]) == pytest.approx(wrong, abs=0.15)


def test_steps_of_per_sample_levels_equal_scalar_ones() -> None:
    start, stop = (
        SCHEDULE(torch.tensor(0.6, dtype=torch.float64)),
        SCHEDULE(torch.tensor(0.5, dtype=torch.float64)),
    )
    before = SCHEDULE(torch.tensor(0.7, dtype=torch.float64))
    for name, sampler in DETERMINISTIC.items():
        results = []
        for shape in ((), (24,)):
            levels = [
                NoiseLevel(v.alpha.expand(shape), v.sigma.expand(shape))
                for v in (before, start, stop)
            ]
            history: deque = deque(maxlen=4)
            x = sampler.step(
                ORACLES["mixture"], QUANTILES, levels[0], levels[1], history, KeyedNoise(0)
            )
            results.append(
                sampler.step(ORACLES["mixture"], x, levels[1], levels[2], history, KeyedNoise(0))
            )
        torch.testing.assert_close(results[0], results[1], msg=name)
