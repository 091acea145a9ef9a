"""The two ends, t = 0 and t = 1, where divisions by zero hide, and the precision in which they are
reached.
"""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from sfumato.diffusion import (
    Denoised,
    Epsilon,
    Flow,
    Geometric,
    Karras,
    NoiseLevel,
    ParameterizationConfig,
    Sample,
    Span,
    UniformLogSNR,
    VarianceExploding,
    Velocity,
    Warped,
)
from sfumato.errors import ScheduleError
from tests.helpers.schedules import SCHEDULES

PARAMETERIZATIONS = [*(kind() for kind in get_args(ParameterizationConfig)), Velocity(0.5)]
TRUTH = Denoised(
    *torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
)
ENDS = torch.tensor([0.0, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("end", [0, 1], ids=["clean", "noise"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("p", PARAMETERIZATIONS, ids=str)
def test_each_end_is_solved_or_refused(p, schedule, end: int) -> None:
    """Refused exactly where the prediction holds one half only; solved without a loss where the
    prediction holds both.
    """
    level = schedule(ENDS).at(end)
    unsolvable = {Epsilon: level.alpha == 0, Sample: level.sigma == 0}.get(type(p), False)
    if unsolvable:
        with pytest.raises(ScheduleError, match=type(p).__name__):
            p.solve(p.target(TRUTH, level), level.mix(*TRUTH), level)
        return
    found = p.solve(p.target(TRUTH, level), level.mix(*TRUTH), level)
    # Epsilon and Sample divide by the half that x barely holds: known to the rounding of x only.
    loose = {Epsilon: 1 / level.alpha, Sample: 1 / level.sigma}.get(
        type(p), torch.ones(())
    ) * level.alpha.maximum(level.sigma)
    tolerance = max(1e-10, 1e-14 * float(loose))
    torch.testing.assert_close(found.x0, TRUTH.x0, atol=tolerance, rtol=1e-10)
    torch.testing.assert_close(found.eps, TRUTH.eps, atol=tolerance, rtol=1e-10)


@pytest.mark.parametrize(
    ("schedule", "logsnr_clean", "logsnr_noise"),
    [
        (
            VarianceExploding(sigma_min=0.02, sigma_max=40.0),
            -2 * torch.tensor(0.02).log(),
            -2 * torch.tensor(40.0).log(),
        ),
        (
            Karras(sigma_min=0.003, sigma_max=70.0),
            -2 * torch.tensor(0.003).log(),
            -2 * torch.tensor(70.0).log(),
        ),
        (
            Geometric(0.8, sigma_max=30.0, steps=20),
            -2 * torch.tensor(30 * 0.8**20).log(),
            -2 * torch.tensor(30.0).log(),
        ),
        (UniformLogSNR(logsnr_min=-8.0, logsnr_max=6.0), torch.tensor(6.0), torch.tensor(-8.0)),
        (
            Warped(
                schedule=UniformLogSNR(logsnr_min=0.0, logsnr_max=10.0),
                warp=Span(low=0.1, high=0.6),
            ),
            torch.tensor(9.0),
            torch.tensor(4.0),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_ends_are_the_named_ones(schedule, logsnr_clean, logsnr_noise) -> None:
    expected = torch.stack([logsnr_clean, logsnr_noise]).double()
    torch.testing.assert_close(schedule(ENDS).logsnr(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_single_precision_and_every_shape_of_time_agree_with_double(schedule) -> None:
    """At half the precision, from 1 % to 99 %; times of any shape."""
    t = torch.linspace(0.01, 0.99, 24)
    exact, single = schedule(t.double()), schedule(t)
    assert single.alpha.dtype == single.sigma.dtype == torch.float32
    torch.testing.assert_close(single.sigma.double(), exact.sigma, rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(single.alpha.double(), exact.alpha, rtol=2e-3, atol=1e-5)
    shaped = schedule(t.double().view(2, 3, 4))
    assert torch.equal(shaped.sigma, exact.sigma.view(2, 3, 4))
    torch.testing.assert_close(
        schedule(t.double()[7]).alpha, exact.alpha[7], rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("p", [Flow(), Velocity(0.5)], ids=str)
def test_network_parameterizations_lose_nothing_in_single_precision_near_pure_noise(p) -> None:
    level = NoiseLevel(torch.tensor(1e-6), torch.tensor(1.0))
    truth = Denoised(TRUTH.x0.float(), TRUTH.eps.float())
    torch.testing.assert_close(
        p.solve(p.target(truth, level), level.mix(*truth), level).x0, truth.x0, atol=1e-5, rtol=1e-5
    )
