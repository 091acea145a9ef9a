"""What every sampler and the driver owe their callers: rescaled paths, dtypes, memory, conditions,
noise.
"""

from __future__ import annotations

import math
from collections import deque

import pytest
import torch

from sfumato.condition import Condition
from sfumato.diffusion import Epsilon, Flow, Karras, Linear, NoiseLevel, Sample, Velocity
from sfumato.errors import ScheduleError
from sfumato.sampling import (
    DDIM,
    SAMPLERS,
    Churn,
    DPMSolverPP2M,
    KeyedNoise,
    Multistep,
    RungeKutta,
    UniPC,
    grid,
    sample,
)
from tests.oracles.exact import Gaussian, Mixture

X = torch.linspace(-1.5, 1.5, 9, dtype=torch.float64)
PARAMETERIZATIONS = (Epsilon(), Sample(), Flow(), Velocity(0.5))
ALL = {
    **SAMPLERS,
    "half-ddim": DDIM(0.5),
    "bounded churn": Churn(DDIM(), gamma=0.2, low=0.5, high=3.0, inflation=1.1),
    **{
        f"{m}/{p}": RungeKutta(m, parameterization=p)
        for m in ("midpoint", "heun", "rk4")
        for p in PARAMETERIZATIONS
    },
    **{f"AB3/{p}": Multistep(3, parameterization=p, exponential=False) for p in PARAMETERIZATIONS},
    "exp3/Epsilon": Multistep(3, parameterization=Epsilon()),
    **{f"UniPC{k}": UniPC(k) for k in (2, 3, 4)},
}


@pytest.mark.parametrize("name", ALL)
def test_the_path_does_not_matter_only_its_logsnr(name: str) -> None:
    """The same log-SNR grid gives the same samples in all coordinates, and for stochastic samplers given the same noise."""
    linear = Linear()(torch.linspace(0.95, 0.05, 25, dtype=torch.float64))
    results = []
    for scale in (torch.ones_like(linear.alpha), 1 / torch.hypot(*linear), 1 / linear.alpha):
        levels = NoiseLevel(linear.alpha * scale, linear.sigma * scale)
        end = sample(ALL[name], Mixture(), X * scale[0], levels, noise=KeyedNoise(2))
        results.append(end / levels.alpha[-1])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ALL)
def test_dtype_and_shape_of_x_are_kept(name: str) -> None:
    levels = Linear()(torch.linspace(0.9, 0.1, 7, dtype=torch.float64))
    x = X.view(3, 1, 1, 3)
    exact, single = (
        sample(ALL[name], Mixture(), x.to(dtype), levels)
        for dtype in (torch.float64, torch.float32)
    )
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_images_do_not_see_one_another(name: str) -> None:
    levels = Linear()(torch.linspace(0.9, 0.1, 7, dtype=torch.float64))
    whole = sample(ALL[name], Mixture(), X, levels, noise=KeyedNoise(4))
    part = sample(ALL[name], Mixture(), X[3:5], levels, noise=KeyedNoise(4, first=3))
    torch.testing.assert_close(part, whole[3:5], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_driver_remembers_as_much_as_any_sampler_uses(name: str) -> None:
    levels, noise, history = (
        Linear()(torch.linspace(0.9, 0.1, 12, dtype=torch.float64)),
        KeyedNoise(0),
        deque(),
    )
    x = X
    for start, stop in levels.steps():
        x = ALL[name].step(Mixture(), x, start, stop, history, noise)
    torch.testing.assert_close(sample(ALL[name], Mixture(), X, levels), x, rtol=1e-12, atol=1e-12)


def test_condition_reaches_the_denoiser_at_every_call_and_no_graph_is_kept() -> None:
    seen, weight = [], torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    condition = Condition(vector=torch.ones(9, 2))

    def denoiser(x, level, condition):
        seen.append(condition)
        return Mixture()(x * weight, level)

    end = sample(RungeKutta("heun"), denoiser, X, grid(Linear(), 4), condition=condition)
    assert len(seen) == 2 * 3 + 1
    assert all(c is condition for c in seen)
    assert not end.requires_grad


def test_progress_names_the_levels_it_was_at() -> None:
    levels, seen = grid(Linear(), 5), []
    sample(UniPC(), Mixture(), X, levels, on_step=seen.append)
    assert [float(p.start.sigma) for p in seen] == levels.sigma[:-1].tolist()
    assert [float(p.level.sigma) for p in seen] == levels.sigma[1:].tolist()


def test_clean_end_keeps_the_schedules_alpha() -> None:
    def half(t: torch.Tensor) -> NoiseLevel:
        return NoiseLevel(torch.full_like(t, 0.5), 0.05 + 4 * t)

    levels = grid(half, 6)
    assert levels.alpha.tolist() == [0.5] * 7
    assert levels.sigma[-1] == 0
    seen = []
    end = sample(DDIM(), Mixture(), X, levels, on_step=seen.append)
    torch.testing.assert_close(end, 0.5 * seen[-1].x0)


def test_levels_that_get_noisier_are_refused_even_where_sigma_falls() -> None:
    """alpha falls faster than sigma."""
    with pytest.raises(ScheduleError, match="level 1 is not less noisy"):
        sample(DDIM(), Mixture(), X, NoiseLevel(torch.tensor([1.0, 0.1]), torch.tensor([1.0, 0.9])))


def test_keyed_noise_draws_afresh_each_time_in_the_dtype_of_x() -> None:
    noise, like = KeyedNoise(0), torch.empty(200, 100, dtype=torch.float64)
    first, second = noise(like), noise(like)
    assert first.dtype == torch.float64
    correlation = float((first * second).mean())
    assert abs(correlation) < 5 / math.sqrt(like.numel())
    assert float(first.var()) == pytest.approx(1, abs=0.05)


def test_unasked_noise_is_that_of_seed_zero() -> None:
    levels = Linear()(torch.linspace(0.9, 0.1, 5, dtype=torch.float64))
    unasked, zero, one = (
        sample(DDIM(1.0), Mixture(), X, levels, noise=n)
        for n in (None, KeyedNoise(0), KeyedNoise(1))
    )
    assert torch.equal(unasked, zero)
    assert not torch.equal(unasked, one)


def test_churn_adds_noise_only_within_its_bounds_on_sigma_over_alpha() -> None:
    sampler, asked = Churn(DDIM(), gamma=0.3, low=0.5, high=2.0, inflation=1.5), torch.ones_like(X)
    for ratio, within in ((0.4, False), (0.6, True), (1.9, True), (2.1, False)):
        start, stop = (
            NoiseLevel(torch.tensor(0.3).double(), torch.tensor(0.3 * r).double())
            for r in (ratio, ratio / 2)
        )
        raised = NoiseLevel(start.alpha, start.sigma * (1.3 if within else 1.0))
        lifted = X + (1.5 * start.sigma * math.sqrt(1.3**2 - 1) if within else 0) * asked
        expected = stop.mix(*Mixture()(lifted, raised))
        found = sampler.step(Mixture(), X, start, stop, deque(), lambda x: asked)
        torch.testing.assert_close(found, expected)


PLAIN = {
    "ddim": DDIM(),
    "ddpm": DDIM(1.0),
    "heun": RungeKutta("heun", parameterization=Epsilon()),
    "rk4": RungeKutta("rk4"),
    "dpm++2m": DPMSolverPP2M(),
    **{f"multistep{k}": Multistep(k) for k in (2, 3, 4)},
    **{f"unipc{k}": UniPC(k) for k in (2, 3, 4)},
}


@pytest.mark.parametrize(
    ("gamma", "most"), [(0.05, 0.03), (math.sqrt(2) - 1, 0.1)]
)  # the larger, the more a first-order step errs
@pytest.mark.parametrize("name", PLAIN)
def test_churn_around_every_plain_sampler_keeps_the_moments_of_the_data(
    name: str, gamma: float, most: float
) -> None:
    """Samplers with memory went to 2.8 and to 4e17 where the data's standard deviation is 0.5:
    their memory predates the noise.
    """
    generator, count = torch.Generator().manual_seed(0), 5_000

    def noise(x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, dtype=x.dtype, generator=generator)

    levels = grid(Karras(), 200)
    data = noise(torch.empty(count, 1, dtype=torch.float64)) * 0.5 + 0.7
    found = sample(
        Churn(PLAIN[name], gamma=gamma),
        Gaussian(0.7, 0.25),
        data + levels.sigma[0] * noise(data),
        levels,
        noise=noise,
    )
    assert float(found.mean()) == pytest.approx(0.7, abs=0.02)
    assert float(found.std()) == pytest.approx(0.5, abs=most)
