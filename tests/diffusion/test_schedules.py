"""Schedules and warps: monotone, exact at their ends, and equal to the formulas they are named
after.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from sfumato.diffusion import (
    Cosine,
    Geometric,
    Karras,
    Linear,
    LinearBetas,
    LogitNormal,
    LogNormal,
    Mode,
    Objective,
    ScaledLinear,
    Shift,
    Sigmoid,
    Span,
    Tabulated,
    UniformLogSNR,
    VarianceExploding,
    VariancePreserving,
    Warped,
    ZeroTerminalSNR,
)
from sfumato.errors import ScheduleError
from sfumato.generation.diffusion_model import SamplingConfig
from tests.helpers.schedules import SCHEDULES

T = torch.linspace(0, 1, 501, dtype=torch.float64)
INNER = T[1:-1]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_logsnr_strictly_falls_and_dtype_is_kept(schedule) -> None:
    level = schedule(T)
    assert (level.alpha >= 0).all()
    assert (level.sigma >= 0).all()
    assert (level.alpha[1:] * level.sigma[:-1] < level.alpha[:-1] * level.sigma[1:]).all()
    single = schedule(T.float())
    assert single.alpha.dtype == torch.float32
    torch.testing.assert_close(single.sigma.double()[5:-5], level.sigma[5:-5], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["Linear", "Cosine", "ZeroTerminalSNR", "Sigmoid", "LogitNormal", "Mode"]
)
def test_ends_are_exactly_clean_and_pure_noise(name: str) -> None:
    level = SCHEDULES[name](torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert level.alpha.tolist() == [1.0, 0.0]
    assert level.sigma.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    "name",
    [
        "Cosine",
        "VariancePreserving",
        "LinearBetas",
        "ScaledLinear",
        "Sigmoid",
        "UniformLogSNR",
        "ZeroTerminalSNR",
    ],
)
def test_variance_is_preserved(name: str) -> None:
    level = SCHEDULES[name](T)
    torch.testing.assert_close(level.alpha**2 + level.sigma**2, torch.ones_like(T))


@pytest.mark.parametrize("steps", [10, 1000])
@pytest.mark.parametrize("kind", [LinearBetas, ScaledLinear])
def test_discrete_betas_are_the_cumulative_product_at_their_times(kind, steps: int) -> None:
    schedule = kind(steps=steps)
    ends = (schedule.beta_start, schedule.beta_end)
    betas = (
        np.linspace(*ends, steps)
        if kind is LinearBetas
        else np.linspace(*np.sqrt(ends), steps) ** 2
    )
    times = (torch.arange(steps, dtype=torch.float64) + 1) / steps
    np.testing.assert_allclose(
        schedule(times).alpha.numpy() ** 2, np.cumprod(1 - betas), rtol=1e-10
    )
    assert schedule(torch.zeros((), dtype=torch.float64)).sigma == 0


def test_variance_preserving_solves_its_sde() -> None:
    """d log alpha / dt = -beta(t)/2 with beta linear in t."""
    schedule, h = VariancePreserving(), 1e-5
    slope = (torch.log(schedule(INNER + h).alpha) - torch.log(schedule(INNER - h).alpha)) / (2 * h)
    torch.testing.assert_close(slope, -0.5 * (0.1 + INNER * 19.9), atol=1e-6, rtol=1e-6)


def test_karras_grid_is_the_papers() -> None:
    n = 18
    paper = [
        (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(n)
    ]
    np.testing.assert_allclose(
        Karras()(torch.linspace(1, 0, n, dtype=torch.float64)).sigma.numpy(), paper, rtol=1e-12
    )


def test_exploding_and_geometric_shrink_by_a_constant_factor() -> None:
    for schedule, ratio in (
        (VarianceExploding(sigma_min=0.1, sigma_max=10.0), 0.01 ** (1 / 500)),
        (Geometric(0.9), 0.9**0.2),
    ):
        sigma = schedule(T.flip(0)).sigma
        torch.testing.assert_close(
            sigma[1:] / sigma[:-1], torch.full((500,), ratio, dtype=torch.float64)
        )


def test_sigmoid_is_the_published_gamma() -> None:
    s = lambda v: 1 / (1 + math.exp(-v / 0.7))  # noqa: E731
    for t in (0.1, 0.5, 0.8):
        gamma = (-s(t * 5 - 2) + s(3)) / (s(3) - s(-2))
        level = Sigmoid(start=-2.0, end=3.0, temperature=0.7)(torch.tensor(t, dtype=torch.float64))
        assert float(level.alpha) ** 2 == pytest.approx(gamma, rel=1e-9)


def test_random_times_have_the_density_that_is_named() -> None:
    np.testing.assert_allclose(
        torch.log(LogNormal(mean=-1.2, std=1.2)(INNER).sigma).numpy(),
        norm.ppf(INNER.numpy(), -1.2, 1.2),
        atol=1e-3,
    )
    t = LogitNormal(mean=0.3, std=0.8)(INNER)
    np.testing.assert_allclose(torch.logit(t).numpy(), norm.ppf(INNER.numpy(), 0.3, 0.8), atol=1e-9)
    level = UniformLogSNR(logsnr_min=-7.0, logsnr_max=3.0)(T)
    torch.testing.assert_close(level.logsnr(), 3 - 10 * T)


def test_log_normal_is_finite_and_positive_at_its_ends() -> None:
    sigma = LogNormal()(torch.tensor([0.0, 1.0], dtype=torch.float64)).sigma
    assert torch.isfinite(sigma).all()
    assert (sigma > 0).all()


def test_shift_moves_logsnr_by_a_constant_on_the_linear_path() -> None:
    shifted = Warped(schedule=Linear(), warp=Shift(3.0))(INNER).logsnr()
    torch.testing.assert_close(shifted, Linear()(INNER).logsnr() - 2 * math.log(3))


def test_mode_is_sd3s_formula_with_time_reversed() -> None:
    scale, u = 0.81, INNER
    published = 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    torch.testing.assert_close(Mode(scale)(1 - u), published)


@pytest.mark.parametrize(
    "warp",
    [Shift(0.2), Shift(5.0), LogitNormal(), Mode(1.7), Mode(-1.0), Span(low=0.2, high=0.7)],
    ids=str,
)
def test_warps_rise_and_stay_in_the_unit_interval(warp) -> None:
    warped = warp(T)
    assert (warped[1:] > warped[:-1]).all()
    assert warped.min() >= 0
    assert warped.max() <= 1


def test_zero_terminal_snr_keeps_the_start_and_reaches_noise() -> None:
    plain, stretched = ScaledLinear()(T), ZeroTerminalSNR(ScaledLinear())(T)
    assert plain.alpha[-1] > 0.05
    first, last = plain.alpha[0], plain.alpha[-1]
    torch.testing.assert_close(stretched.alpha, (plain.alpha - last) * first / (first - last))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Mode(3.0),
        lambda: Span(low=0.5, high=0.5),
        lambda: Tabulated(alphas=(1.0, 0.5), sigmas=(0.1,)),
        lambda: Tabulated(alphas=(1.0, 0.9), sigmas=(0.5, 0.1)),
        lambda: ZeroTerminalSNR(Karras())(T),
    ],
)
def test_impossible_ones_are_refused(build) -> None:
    with pytest.raises(ScheduleError):
        build()


@pytest.mark.parametrize(
    "wrong",
    [
        Karras(rho=0.0),
        Karras(sigma_min=80.0, sigma_max=0.002),
        VarianceExploding(sigma_min=0.0),
        LinearBetas(steps=0),
        LinearBetas(beta_end=1.5),
        Warped(schedule=Linear(), warp=Shift(0.0)),
        Warped(schedule=Linear(), warp=Shift(-1.0)),
        UniformLogSNR(logsnr_min=10.0, logsnr_max=-10.0),
    ],
)
@pytest.mark.parametrize("config", [Objective, SamplingConfig])
def test_what_leads_nowhere_is_refused_where_it_is_used(wrong, config) -> None:
    with pytest.raises(ScheduleError, match=r"^(objective|sampling)\.schedule: .*\n +hint"):
        config(schedule=wrong)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_what_leads_from_data_to_noise_may_be_used(schedule) -> None:
    assert (
        Objective(schedule=schedule).schedule
        == SamplingConfig(schedule=schedule).schedule
        == schedule
    )


def test_tabulated_passes_through_its_levels() -> None:
    schedule = Tabulated(alphas=(1.0, 0.9, 0.2), sigmas=(0.0, 0.3, 0.9))
    level = schedule(torch.tensor([0.0, 0.5, 0.75, 1.0], dtype=torch.float64))
    np.testing.assert_allclose(level.alpha, [1.0, 0.9, 0.55, 0.2])
    np.testing.assert_allclose(level.sigma, [0.0, 0.3, 0.6, 0.9])
    assert Cosine()(T).alpha[250] == pytest.approx(math.sqrt(0.5))
