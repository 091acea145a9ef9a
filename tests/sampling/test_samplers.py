"""Invariants 4, 6 and 7, the blackboard loop, the driver, keyed noise."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from sfumato.diffusion import (
    Cosine,
    Denoised,
    EmpiricalDenoiser,
    Epsilon,
    Flow,
    Geometric,
    Karras,
    Linear,
    NoiseLevel,
    Shift,
    VarianceExploding,
    Velocity,
    Warped,
)
from sfumato.errors import ConfigError, ScheduleError
from sfumato.sampling import (
    DDIM,
    SAMPLERS,
    Churn,
    DPMSolverPP2M,
    KeyedNoise,
    Multistep,
    RungeKutta,
    UniPC,
    count_evaluations,
    grid,
    sample,
)
from tests.oracles.exact import ORACLES, Gaussian, Mixture

X = torch.linspace(-1.5, 1.5, 9, dtype=torch.float64)
DETERMINISTIC = {
    name: s for name, s in SAMPLERS.items() if name not in ("ddpm", "dpm-solver++2m-sde", "churn")
}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_schedule_does_not_matter_only_its_logsnr(name: str) -> None:
    """The same log-SNR grid on the linear, a variance-preserving and a
    variance-exploding path.
    """
    linear = Linear()(torch.linspace(0.95, 0.05, 41, dtype=torch.float64))
    results = []
    for scale in (torch.ones(41).double(), 1 / torch.hypot(*linear), 1 / linear.alpha):
        levels = NoiseLevel(linear.alpha * scale, linear.sigma * scale)
        end = sample(DETERMINISTIC[name], Mixture(), X * scale[0], levels)
        results.append(end / levels.alpha[-1])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize(
    "schedule", [Linear(), Cosine(), Warped(schedule=Linear(), warp=Shift(0.2)), Karras()], ids=str
)
def test_full_trajectory_ends_at_the_exact_solution(name: str, schedule) -> None:
    """From alpha = 0 or sigma = 80 to clean data, nothing divides by zero and the end is right."""
    levels, oracle = grid(schedule, 100), Gaussian()
    start = levels.at(0)
    x = X * torch.hypot(0.5 * start.alpha, start.sigma)
    end = sample(DETERMINISTIC[name], oracle, x, levels)
    exact = oracle.flow(x, start, NoiseLevel(torch.ones(()).double(), torch.zeros(()).double()))
    torch.testing.assert_close(end, exact, atol=0.05, rtol=0.05)


def test_ddim_is_euler_in_three_coordinates() -> None:
    levels = grid(Cosine(), 12)
    plain = sample(DDIM(), Mixture(), X, levels)
    for p in (Flow(),):
        torch.testing.assert_close(
            sample(RungeKutta("euler", parameterization=p), Mixture(), X, levels), plain
        )
    inner = levels.at(slice(1, 12))
    reference = sample(DDIM(), Mixture(), X, inner)
    torch.testing.assert_close(
        sample(RungeKutta("euler", parameterization=Epsilon()), Mixture(), X, inner), reference
    )
    assert not torch.allclose(
        sample(RungeKutta("euler", parameterization=Velocity()), Mixture(), X, inner),
        reference,
        atol=1e-4,
    )


def test_the_blackboard_loop_is_ddim_on_a_geometric_grid() -> None:
    """Predict all the noise, subtract it, add 90 % of it back, repeat."""
    denoise = EmpiricalDenoiser(
        torch.randn(20, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    )
    levels = Geometric(0.9)(torch.linspace(1, 0, 101, dtype=torch.float64))
    torch.testing.assert_close(
        levels.sigma[1:] / levels.sigma[:-1], torch.full((100,), 0.9).double()
    )
    start = x = (
        levels.sigma[0]
        * torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    )
    for sigma in levels.sigma[:-1]:
        predicted = denoise(x, NoiseLevel(torch.ones_like(sigma), sigma)).eps
        x = (x - sigma * predicted) + 0.9 * sigma * predicted
    torch.testing.assert_close(sample(DDIM(), denoise, start, levels), x)


def test_churned_heun_is_edms_algorithm_2() -> None:
    oracle, steps, churn, noise_scale = Mixture(), 8, 4.0, 1.007
    levels = grid(Karras(sigma_min=0.02, sigma_max=20.0), steps)
    gamma = min(churn / steps, math.sqrt(2) - 1)
    sampler = Churn(
        RungeKutta("heun", parameterization=Epsilon()),
        gamma=gamma,
        low=0.1,
        high=10.0,
        inflation=noise_scale,
    )
    ours = sample(sampler, oracle, 20 * X, levels, noise=KeyedNoise(3))

    x, noise = 20 * X, KeyedNoise(3)

    def slope(x, sigma):
        return (x - oracle(x, NoiseLevel(torch.ones_like(sigma), sigma)).x0) / sigma

    for sigma, after in zip(levels.sigma[:-1], levels.sigma[1:], strict=True):
        if after == 0:  # the driver's last step, taken without churn
            x = oracle(x, NoiseLevel(torch.ones_like(sigma), sigma)).x0
            break
        hat = sigma * (1 + gamma) if 0.1 <= sigma <= 10 else sigma
        x = x + torch.sqrt(hat**2 - sigma**2) * noise_scale * noise(x)
        first = slope(x, hat)
        euler = x + (after - hat) * first
        x = x + (after - hat) * (first + slope(euler, after)) / 2
    torch.testing.assert_close(ours, x)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_dpm_solver_2m_is_the_published_formula(eta: float) -> None:
    """In k-diffusion's sigma space; the SDE form with the same noise."""
    oracle = Mixture()
    sigmas = VarianceExploding(sigma_min=0.05, sigma_max=30.0)(
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
        guess = oracle(x, NoiseLevel(torch.ones_like(sigma), sigma)).x0
        h = torch.log(sigma / after)
        used = guess if old is None else guess + (guess - old) * h / (2 * last)
        x = after / sigma * torch.exp(-eta * h) * x - torch.expm1(-h - eta * h) * used
        if eta:
            x = x + after * torch.sqrt(-torch.expm1(-2 * h)) * noise(x)
        old, last = guess, h
    torch.testing.assert_close(ours, x)


def propagate(sampler, steps: int) -> tuple[float, float]:
    """Mean and variance after a trajectory on Gaussian data: each step is affine in x and in its
    noise.
    """
    oracle, levels = (
        Gaussian(),
        Linear()(torch.linspace(0.999, 0.02, steps + 1, dtype=torch.float64)),
    )
    a = levels.at(0)
    mean, variance = float(a.alpha) * 0.7, float(a.alpha**2 * 0.25 + a.sigma**2)
    for start, stop in levels.steps():

        def step(x: float, z: float, start=start, stop=stop) -> float:
            value = torch.tensor([x], dtype=torch.float64)
            return float(
                sampler.step(oracle, value, start, stop, [], lambda v: torch.full_like(v, z))
            )

        shift = step(0.0, 0.0)
        gain, noise = step(1.0, 0.0) - shift, step(0.0, 1.0) - shift
        mean, variance = gain * mean + shift, gain**2 * variance + noise**2
    b = levels.at(-1)
    return mean - float(b.alpha) * 0.7, variance - float(b.alpha**2 * 0.25 + b.sigma**2)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ancestral_sampling_keeps_the_marginal_in_the_limit(eta: float) -> None:
    coarse, fine = propagate(DDIM(eta), 50), propagate(DDIM(eta), 800)
    assert abs(fine[0]) < 1e-9
    assert abs(fine[1]) < 3e-3
    assert abs(fine[1]) < abs(coarse[1]) / 8


def test_negative_control_noise_of_the_wrong_size_does_not_keep_it() -> None:
    class TooMuch:
        def step(self, denoise, x, start, stop, history, noise):
            return DDIM(1.0).step(denoise, x, start, stop, history, lambda v: 1.3 * noise(v))

    assert abs(propagate(TooMuch(), 800)[1]) > 0.05


def test_stochastic_samplers_sample_the_mixture() -> None:
    """Fractions and spread of a two-component mixture, 20,000 draws."""
    for name in ("ddpm", "dpm-solver++2m-sde", "churn"):
        levels = grid(Karras(sigma_min=0.02, sigma_max=40.0), 250)
        x = 40 * KeyedNoise(5)(torch.empty(20_000, dtype=torch.float64))
        end = sample(SAMPLERS[name], Mixture(), x, levels, noise=KeyedNoise(6))
        mean, second = -0.3 + 0.7 * 1.4, 0.3 * 1.3 + 0.7 * (1.4**2 + 0.3)
        assert float(end.mean()) == pytest.approx(mean, abs=0.04), name
        assert float(end.square().mean()) == pytest.approx(second, abs=0.08), name


def test_last_step_onto_clean_data_is_the_guess_itself() -> None:
    oracle, level = ORACLES["mixture"], Linear()(torch.tensor([0.4, 0.0], dtype=torch.float64))
    for sampler in SAMPLERS.values():
        torch.testing.assert_close(sample(sampler, oracle, X, level), oracle(X, level.at(0)).x0)


def test_grid_ends_clean_and_spends_its_steps_as_edm_does() -> None:
    linear = grid(Linear(), 4)
    torch.testing.assert_close(linear.sigma, torch.tensor([1, 0.75, 0.5, 0.25, 0]).double())
    karras = grid(Karras(), 18)
    assert karras.sigma[-1] == 0
    assert karras.sigma[-2] == pytest.approx(0.002)
    assert len(karras.sigma) == 19
    assert grid(Karras(), 1).sigma.tolist() == pytest.approx([80.0, 0.0])
    with pytest.raises(ScheduleError, match="at least 1 step"):
        grid(Linear(), 0)


@pytest.mark.parametrize(
    ("alphas", "sigmas", "said"),
    [
        ([0.5], [0.5], "not a grid"),
        ([0.1, 0.5, 0.4], [0.9, 0.5, 0.6], "level 2 is not less noisy than level 1"),
        ([0.1, 0.1], [0.9, 0.9], "not less noisy"),
        ([0.1, float("nan")], [0.9, 0.5], "non-finite"),
        ([-0.1, 0.5], [0.9, 0.5], "negative"),
    ],
)
def test_a_bad_grid_is_a_clear_error(alphas, sigmas, said: str) -> None:
    with pytest.raises(ScheduleError, match=said):
        sample(DDIM(), Gaussian(), X, NoiseLevel(torch.tensor(alphas), torch.tensor(sigmas)))


def test_on_step_sees_the_way_and_may_stop_it() -> None:
    seen = []
    end = sample(RungeKutta("heun"), Mixture(), X, grid(Linear(), 5), on_step=seen.append)
    assert [(p.step, p.steps) for p in seen] == [(i, 5) for i in range(1, 6)]
    assert torch.equal(seen[-1].x, end)
    for before, after in itertools.pairwise(seen):
        assert torch.equal(after.before, before.x)
        torch.testing.assert_close(after.x0, Mixture()(after.before, after.start).x0)

    class Stop(Exception):
        pass

    def stop(progress) -> None:
        raise Stop

    with pytest.raises(Stop):
        sample(DDIM(), Mixture(), X, grid(Linear(), 5), on_step=stop)


def test_keyed_noise_depends_on_the_image_not_on_the_batch() -> None:
    whole, part = KeyedNoise(7), KeyedNoise(7, first=3)
    for _ in range(3):
        assert torch.equal(whole(torch.empty(8, 2, 5))[3:6], part(torch.empty(3, 2, 5)))
    assert not torch.equal(KeyedNoise(8)(torch.empty(2, 4)), KeyedNoise(7)(torch.empty(2, 4)))


def test_orders_that_do_not_exist_are_refused() -> None:
    for build in (lambda: Multistep(5), lambda: UniPC(1)):
        with pytest.raises(ConfigError, match="is not one of"):
            build()


def test_a_coordinate_that_is_infinite_at_pure_noise_is_a_clear_error() -> None:
    for sampler in (
        RungeKutta("heun", parameterization=Epsilon()),
        Multistep(2, parameterization=Epsilon(), exponential=False),
    ):
        with pytest.raises(ScheduleError, match=r"(?s)Epsilon.*Flow\(\) or Velocity"):
            sample(sampler, Gaussian(), X, grid(Linear(), 5))


def test_denoised_pairs_are_all_a_sampler_sees() -> None:
    """A denoiser that always knows the image is followed there in one call."""
    known = torch.tensor([0.3, -0.4], dtype=torch.float64)

    def denoise(x, level, condition) -> Denoised:
        return Denoised(known, (x - level.alpha * known) / level.sigma)

    for sampler in SAMPLERS.values():
        torch.testing.assert_close(
            sample(sampler, denoise, torch.tensor([5.0, 1.0]).double(), grid(Linear(), 7)), known
        )


@pytest.mark.parametrize(
    ("name", "expected"),
    [("ddim", 10), ("ddpm", 10), ("heun", 19), ("rk4", 37), ("unipc", 10), ("churn", 19)],
)
def test_evaluations_of_a_trajectory_are_counted(name: str, expected: int) -> None:
    """The last step onto clean data takes one."""
    assert count_evaluations(SAMPLERS[name], grid(Linear(), 10)) == expected
