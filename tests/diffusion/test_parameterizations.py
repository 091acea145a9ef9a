"""Invariants 1, 2 and 9: targets, the 2x2 solve, tangents, loss conversion."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from sfumato.config import members
from sfumato.diffusion import (
    Denoised,
    Epsilon,
    Flow,
    NoiseLevel,
    ParameterizationConfig,
    Sample,
    UnitVariance,
    Velocity,
    target_weight,
)
from sfumato.diffusion.weighting import (
    EDM,
    MinSNR,
    Native,
    SigmoidWeighting,
    TargetSpace,
    UniformEpsilon,
    Weighting,
)
from sfumato.errors import ScheduleError
from tests.helpers.schedules import SCHEDULES

PARAMETERIZATIONS = [*(kind() for kind in get_args(ParameterizationConfig)), Velocity(0.5)]
TIMES = torch.tensor([1e-3, 0.2, 0.5, 0.9, 0.999999], dtype=torch.float64)


def pair(count: int = 7) -> Denoised:
    generator = torch.Generator().manual_seed(0)
    return Denoised(
        *(torch.randn(count, 2, 3, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    )


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("p", PARAMETERIZATIONS, ids=str)
def test_target_and_solve_are_inverse(p, schedule) -> None:
    truth = pair()
    for t in TIMES:
        level = schedule(t)
        found = p.solve(p.target(truth, level), level.mix(*truth), level)
        # a half that x barely holds can only be known to the rounding of x
        torch.testing.assert_close(
            found.x0 * level.alpha, truth.x0 * level.alpha, atol=1e-9, rtol=1e-9
        )
        torch.testing.assert_close(
            found.eps * level.sigma, truth.eps * level.sigma, atol=1e-9, rtol=1e-9
        )
        torch.testing.assert_close(level.mix(*found), level.mix(*truth), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("p", [Flow(), Velocity(1.0), Velocity(0.5), Sample()], ids=str)
def test_pure_noise_is_solved_exactly(p) -> None:
    truth = pair()
    level = NoiseLevel(
        torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    )
    found = p.solve(p.target(truth, level), level.mix(*truth), level)
    torch.testing.assert_close(found.x0, truth.x0)
    torch.testing.assert_close(found.eps, truth.eps)


@pytest.mark.parametrize(("p", "alpha", "sigma"), [(Epsilon(), 0.0, 1.0), (Sample(), 1.0, 0.0)])
def test_the_end_that_a_prediction_cannot_solve_is_a_clear_error(
    p, alpha: float, sigma: float
) -> None:
    level = NoiseLevel(torch.tensor(alpha), torch.tensor(sigma))
    with pytest.raises(ScheduleError, match=rf"(?s){type(p).__name__}.*hint.*Velocity or Flow"):
        p.solve(torch.zeros(1, 2), torch.zeros(1, 2), level)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("p", PARAMETERIZATIONS, ids=str)
def test_target_is_the_derivative_of_the_scaled_path(p, schedule) -> None:
    truth = Denoised(
        torch.tensor(0.3, dtype=torch.float64), torch.tensor(-1.1, dtype=torch.float64)
    )
    for t in (0.15, 0.4, 0.7):
        a, b = (schedule(torch.tensor(time, dtype=torch.float64)) for time in (t - 1e-5, t + 1e-5))
        middle = schedule(torch.tensor(t, dtype=torch.float64))
        slope = (b.mix(*truth) / p.scale(b) - a.mix(*truth) / p.scale(a)) / (
            p.coordinate(b) - p.coordinate(a)
        )
        torch.testing.assert_close(slope, p.target(truth, middle), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("p", PARAMETERIZATIONS, ids=str)
def test_level_is_the_inverse_of_the_coordinate_at_unit_scale(p) -> None:
    level = SCHEDULES["Cosine"](torch.linspace(0.05, 0.95, 9, dtype=torch.float64))
    back = p.level(p.coordinate(level))
    torch.testing.assert_close(back.logsnr(), level.logsnr())
    torch.testing.assert_close(p.scale(back), torch.ones_like(back.alpha))


@pytest.mark.parametrize("p", PARAMETERIZATIONS, ids=str)
def test_errors_convert_by_the_determinant(p) -> None:
    level = SCHEDULES["VariancePreserving"](torch.tensor(0.3, dtype=torch.float64))
    x = torch.tensor([[0.4]], dtype=torch.float64)
    one, two = (Sample().solve(torch.full_like(x, value), x, level) for value in (0.2, 0.5))
    gap = (p.target(one, level) - p.target(two, level)).abs()
    determinant = p.determinant(level).abs()
    torch.testing.assert_close(gap, determinant / level.sigma * (one.x0 - two.x0).abs())
    torch.testing.assert_close(gap, determinant / level.alpha * (one.eps - two.eps).abs())


def test_velocity_is_edm_up_to_sign() -> None:
    sd, sigma = 0.5, torch.tensor(2.3, dtype=torch.float64)
    level, truth = NoiseLevel(torch.ones_like(sigma), sigma), pair()
    x = level.mix(*truth)
    skip = sd**2 / (sigma**2 + sd**2)
    out, scale = sigma * sd / torch.sqrt(sigma**2 + sd**2), 1 / torch.sqrt(sigma**2 + sd**2)
    torch.testing.assert_close((truth.x0 - skip * x) / out, -Velocity(sd).target(truth, level))
    torch.testing.assert_close(UnitVariance(sd)(level), scale)


EPS_SPACE = {  # w(lambda) on |eps^ - eps|^2, as the papers give it
    "UniformEpsilon": (UniformEpsilon(), lambda snr, p: torch.ones_like(snr)),
    "MinSNR": (MinSNR(5.0), lambda snr, p: torch.minimum(snr, torch.tensor(5.0)) / snr),
    "SigmoidWeighting": (SigmoidWeighting(1.5), lambda snr, p: torch.sigmoid(1.5 - torch.log(snr))),
    "EDM": (EDM(0.5), lambda snr, p: 1 + 1 / snr / 0.25),
    "TargetSpace": (
        TargetSpace(space=Flow(), max_weight=400),
        lambda snr, p: torch.minimum((1 + snr**-0.5) ** 2, 400 / snr),
    ),
    "Native": (
        Native(),
        lambda snr, p: {
            Epsilon(): torch.ones_like(snr),
            Sample(): 1 / snr,
            Velocity(1.0): 1 + 1 / snr,
            Velocity(0.5): (0.25 + 1 / snr) / 0.25,
            Flow(): (1 + snr**-0.5) ** 2,
        }[p],
    ),
}


def test_every_weighting_is_checked() -> None:
    assert set(EPS_SPACE) == {kind.__name__ for kind in members(Weighting)}


@pytest.mark.parametrize("name", EPS_SPACE)
@pytest.mark.parametrize("p", PARAMETERIZATIONS, ids=str)
def test_weighting_is_the_published_one_in_noise_space(p, name: str) -> None:
    weighting, published = EPS_SPACE[name]
    for schedule in ("Linear", "Cosine", "Karras"):
        level = SCHEDULES[schedule](torch.linspace(0.05, 0.95, 9, dtype=torch.float64))
        in_noise_space = (
            target_weight(weighting, level, p) * (p.determinant(level) / level.alpha) ** 2
        )
        torch.testing.assert_close(in_noise_space, published(torch.exp(level.logsnr()), p))
