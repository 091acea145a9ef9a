"""What is told to a network, what an objective passes on, and the published constants."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sfumato.condition import NO_CONDITION, Condition
from sfumato.diffusion import (
    Angle,
    ClampX0,
    Cosine,
    Denoised,
    DynamicThresholding,
    EmpiricalDenoiser,
    Flow,
    FlowTime,
    GuidanceInterval,
    Linear,
    LinearBetas,
    LogitNormal,
    LogNormal,
    LogSNR,
    MinibatchOptimalTransport,
    Native,
    NetworkDenoiser,
    NoiseLevel,
    Objective,
    Sample,
    ScaledLinear,
    Stratified,
    UniformLogSNR,
    UnitSum,
    UnitVariance,
    Velocity,
    Warped,
    ZeroTerminalSNR,
)
from tests.oracles.exact import Gaussian

T = torch.linspace(0, 1, 11, dtype=torch.float64)


def images(seed: int, count: int = 6) -> torch.Tensor:
    return torch.randn(
        count, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def network(x, noise_input, condition):
    shift = 0.0 if condition.vector is None else condition.vector.sum(1).view(-1, 1, 1, 1)
    return torch.tanh(x + noise_input.view(-1, 1, 1, 1) + shift)


def test_noise_inputs_are_what_they_are_named_after() -> None:
    torch.testing.assert_close(Angle()(Cosine()(T)), T)
    torch.testing.assert_close(FlowTime()(Linear()(T)), T)
    level = LogNormal(mean=-1.2, std=1.2)(T)
    told = LogSNR(limit=20.0)(level)
    # EDM's c_noise, up to its scale
    torch.testing.assert_close(told, 0.5 + torch.log(level.sigma) / 20)


def test_told_logsnr_is_finite_at_both_ends() -> None:
    torch.testing.assert_close(
        LogSNR(limit=24.0)(Linear()(torch.tensor([0.0, 1.0]))), torch.tensor([0.0, 1.0])
    )


@pytest.mark.parametrize("told", [Angle(), LogSNR(), FlowTime()], ids=str)
def test_what_a_network_is_told_runs_from_0_at_data_to_1_at_noise(told) -> None:
    values = told(Linear()(torch.linspace(0, 1, 101, dtype=torch.float64)))
    assert (values.diff() >= 0).all()
    assert (float(values[0]), float(values[-1])) == (0.0, 1.0)


def test_input_scales_are_the_identity_on_their_paths() -> None:
    torch.testing.assert_close(UnitSum()(Linear()(T)), torch.ones_like(T))
    torch.testing.assert_close(UnitVariance()(Cosine()(T)), torch.ones_like(T))


@pytest.mark.parametrize("sigma_data", [0.3, 1.0, 2.0])
def test_network_sees_unit_variance_and_velocity_targets_have_it_too(sigma_data: float) -> None:
    """EDM's two design rules, on data of that standard deviation."""
    pair = Denoised(sigma_data * images(0, 20_000), images(1, 20_000))
    for t in (0.1, 0.5, 0.9):
        level, seen = Linear()(torch.tensor(t, dtype=torch.float64)), []

        def watch(x, noise_input, condition, seen=seen):
            seen.append(x)
            return x

        p = Velocity(sigma_data)
        NetworkDenoiser(network=watch, parameterization=p, input_scale=UnitVariance(sigma_data))(
            level.mix(*pair), level
        )
        assert float(seen[0].std()) == pytest.approx(1, abs=0.01)
        assert float(p.target(pair, level).std()) == pytest.approx(1, abs=0.01)


def test_published_tables_of_betas() -> None:
    """Cumulative products of DDPM's 1000 linear betas and of Stable Diffusion's scaled-linear ones,
    from plain numpy.
    """
    last = torch.ones((), dtype=torch.float64)
    for schedule, betas in (
        (LinearBetas(), np.linspace(1e-4, 0.02, 1000)),
        (ScaledLinear(), np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2),
    ):
        assert float(schedule(last).alpha) ** 2 == pytest.approx(
            float(np.prod(1 - betas)), rel=1e-9
        )
        assert float(schedule(last / 1000).alpha) ** 2 == pytest.approx(1 - betas[0], rel=1e-12)
    # as Lin et al. 2024 quote it: 0.0047
    assert float(ScaledLinear()(last).alpha) ** 2 == pytest.approx(0.00466, abs=1e-5)


def test_zero_terminal_snr_keeps_a_start_that_is_not_clean() -> None:
    plain = UniformLogSNR(logsnr_min=-4.0, logsnr_max=2.0)
    level = ZeroTerminalSNR(plain)(T)
    torch.testing.assert_close(level.alpha[0], plain(T).alpha[0])
    assert level.alpha[-1] == 0
    assert level.sigma[-1] == 1


def test_clip_clamps_to_its_own_bounds() -> None:
    level, x = Linear()(torch.tensor(0.5, dtype=torch.float64)), 4 * images(0)
    plain = Gaussian(mean=0.0, variance=4.0)
    clipped = ClampX0(denoiser=plain, low=-0.5, high=2.0)(x, level, NO_CONDITION)
    torch.testing.assert_close(clipped.x0, plain(x, level).x0.clamp(-0.5, 2.0))
    torch.testing.assert_close(level.mix(*clipped), x)


def test_threshold_leaves_a_guess_within_range_alone() -> None:
    level, x = Linear()(torch.tensor(0.5, dtype=torch.float64)), 0.1 * images(0)
    plain = Gaussian(mean=0.0, variance=0.5)
    assert plain(x, level).x0.abs().max() < 1
    torch.testing.assert_close(
        DynamicThresholding(denoiser=plain)(x, level, NO_CONDITION), plain(x, level)
    )


def test_interval_calls_only_the_one_it_chooses_and_passes_the_condition() -> None:
    called, condition = [], Condition(vector=torch.ones(6, 1))

    def named(name: str):
        return lambda x, level, condition: called.append((name, condition)) or Denoised(x, x)

    both = GuidanceInterval(inside=named("in"), outside=named("out"), low=-1.0, high=2.0)
    for logsnr in (-1.5, 0.0, 2.5):
        level = UniformLogSNR(logsnr_min=logsnr, logsnr_max=logsnr + 1)(torch.ones(()))
        both(images(0), level, condition)
    assert [name for name, _ in called] == ["out", "in", "out"]
    assert all(c is condition for _, c in called)


def test_empirical_denoiser_does_not_overflow_at_tiny_noise() -> None:
    data = images(0)
    level = NoiseLevel(torch.tensor(1.0).double(), torch.tensor(1e-4).double())
    torch.testing.assert_close(EmpiricalDenoiser(data)(data + 1e-4 * images(1), level).x0, data)


def test_objective_couples_and_conditions() -> None:
    """The loss of the reordered noise under the condition, by hand; in the velocity's own space the
    weight is 1.
    """
    denoiser = NetworkDenoiser(
        network=network, parameterization=Flow(), noise_input=FlowTime(), input_scale=UnitSum()
    )
    objective = Objective(
        schedule=Linear(), weighting=Native(), coupling=MinibatchOptimalTransport()
    )
    x0, noise, condition = (
        images(0),
        images(1),
        Condition(vector=torch.linspace(-1, 1, 6).double().view(6, 1)),
    )
    level = objective.levels(torch.full((6,), 0.5, dtype=torch.float64))
    found = objective(denoiser, x0, condition, level=level, noise=noise)
    matched = MinibatchOptimalTransport()(x0, noise)
    assert not torch.equal(matched, noise)
    t = level.sigma.view(-1, 1, 1, 1)
    output = torch.tanh((1 - t) * x0 + t * matched + t + condition.vector.view(-1, 1, 1, 1))
    torch.testing.assert_close(found.per_sample, (output - (matched - x0)).square().mean((1, 2, 3)))
    assert torch.equal(found.level.sigma, level.sigma)


def test_objective_draws_levels_through_times_and_schedule() -> None:
    uniform = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    warp = LogitNormal()
    level = Objective(schedule=Warped(schedule=Linear(), warp=warp)).levels(uniform)
    torch.testing.assert_close(level.sigma, warp(Stratified()(uniform)))


@pytest.mark.parametrize("seed", range(5))
def test_optimal_transport_is_never_dearer_and_keeps_each_noise_once(seed: int) -> None:
    x0, noise = images(seed, 32), images(seed + 100, 32)
    matched = MinibatchOptimalTransport()(x0, noise)
    assert (x0 - matched).square().sum() < (x0 - noise).square().sum()
    assert sorted(matched[:, 0, 0, 0].tolist()) == sorted(noise[:, 0, 0, 0].tolist())


def test_optimal_transport_minimizes_squares_not_distances() -> None:
    x0 = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    # squares: 1 + 1.25 < 4.25 + 0; distances: 1 + 1.12 > 2.06 + 0
    noise = torch.tensor([[1.0, 0.0], [2.0, 0.5]])
    assert torch.equal(MinibatchOptimalTransport()(x0, noise), noise)
    assert torch.equal(MinibatchOptimalTransport()(x0, noise.flip(0)), noise)


def test_prediction_comes_back_in_the_dtype_of_x() -> None:
    level, x = Cosine()(torch.tensor(0.4)), images(0).float()
    half = NetworkDenoiser(
        network=lambda x, n, c: x.bfloat16(), parameterization=Flow(), compute_dtype=torch.bfloat16
    )
    assert half.predict(x, level).dtype == torch.float32


@pytest.mark.parametrize("quiet", [0.05, 0.5])
def test_threshold_never_brightens(quiet: float) -> None:
    """An image whose quantile is below 1 is not stretched to fill the range, only its outliers are
    clamped to 1.
    """
    guess = torch.full((1, 1, 10, 10), quiet, dtype=torch.float64)
    guess[0, 0, 0, 0] = 3.0
    level, x = (
        Linear()(torch.tensor(0.5, dtype=torch.float64)),
        images(0)[:1, :1].repeat(1, 1, 4, 4)[..., :10, :10],
    )
    found = DynamicThresholding(
        denoiser=lambda x, level, condition: Sample().solve(guess, x, level), quantile=0.95
    )(x, level, NO_CONDITION)
    torch.testing.assert_close(found.x0, guess.clamp(max=1))


def test_solve_is_linear_in_the_prediction() -> None:
    level, x = Cosine()(torch.tensor(0.4, dtype=torch.float64)), images(0)
    for p in (Sample(), Flow(), Velocity(0.7)):
        one, two = p.solve(images(1), x, level), p.solve(images(2), x, level)
        mixed = p.solve(0.25 * images(1) + 0.75 * images(2), x, level)
        torch.testing.assert_close(mixed.x0, 0.25 * one.x0 + 0.75 * two.x0)


@pytest.mark.parametrize("shape", [(), (6,)])
def test_levels_in_double_do_not_widen_images_in_single(shape) -> None:
    level = NoiseLevel(
        torch.full(shape, 0.6, dtype=torch.float64), torch.full(shape, 0.8, dtype=torch.float64)
    )
    x0, eps = images(0).float(), images(1).float()
    assert level.mix(x0, eps).dtype == torch.float32
    torch.testing.assert_close(level.mix(x0, eps), 0.6 * x0 + 0.8 * eps)
    assert Velocity().target(Denoised(x0, eps), level).dtype == torch.float32
    assert Velocity().solve(x0, eps, level).x0.dtype == torch.float32
