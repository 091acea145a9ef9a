"""How well samplers fill a hole: a Gaussian of two correlated numbers, one known; the mean and
deviation of the other are exact.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sfumato.diffusion import Denoised, Inpaint, Linear, NoiseLevel, Sample
from sfumato.errors import ConfigError
from sfumato.sampling import (
    DDIM,
    INPAINTING_SAMPLER,
    REPAINT_SAMPLER,
    SAMPLERS,
    Churn,
    KeyedNoise,
    RePaint,
    UniPC,
    chosen_sampler,
    grid,
    repeated,
    sample,
    sampler_name,
)

RHO, VALUE, COUNT = 0.9, 1.5, 4000
COVARIANCE = torch.tensor([[1, RHO], [RHO, 1]], dtype=torch.float64)


def oracle(x: Tensor, level: NoiseLevel, condition: object = None) -> Denoised:
    alpha, sigma = float(level.alpha), float(level.sigma)
    noisy = alpha**2 * COVARIANCE + sigma**2 * torch.eye(2, dtype=torch.float64)
    return Sample().solve(
        (x.flatten(1) @ (alpha * COVARIANCE @ torch.linalg.inv(noisy)).T).view_as(x), x, level
    )


def filled(sampler: object, steps: int = 25) -> tuple[float, float]:
    """Errors of the unknown number's mean and deviation, given that the other one is 1.5."""
    known = torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 1, 1, 2)
    denoiser = Inpaint(denoiser=oracle, image=VALUE * known, known=known)
    noise = KeyedNoise(0)
    x = noise(torch.empty(COUNT, 1, 1, 2, dtype=torch.float64))
    y = sample(sampler, denoiser, x, grid(Linear(), steps), noise=noise)
    assert float((y[..., 0] - VALUE).abs().max()) < 1e-9
    return abs(float(y[..., 1].mean()) - RHO * VALUE), abs(
        float(y[..., 1].std()) - math.sqrt(1 - RHO**2)
    )


def test_the_samplers_of_holes_follow_what_is_known_more_closely_than_the_default() -> None:
    default = SAMPLERS["dpm-solver++2m"]
    usual = filled(chosen_sampler(None, default))
    churn = filled(chosen_sampler(None, default, inpainting=True))
    ddpm = chosen_sampler(None, default, inpainting=True, resample=10)
    resampled = filled(repeated(ddpm, inpainting=True, resample=10))
    assert usual[0] > 0.5
    assert churn[0] < 0.6 * usual[0]
    assert churn[1] < usual[1]
    assert resampled[0] < churn[0]


def test_which_sampler_fills() -> None:
    usual = DDIM()
    assert chosen_sampler(None, usual) == usual
    assert chosen_sampler(None, usual, inpainting=True) == SAMPLERS[INPAINTING_SAMPLER]
    assert chosen_sampler("heun", usual, inpainting=True) == SAMPLERS["heun"]
    ddpm = SAMPLERS[REPAINT_SAMPLER]
    assert chosen_sampler(None, usual, inpainting=True, resample=3) == ddpm
    assert repeated(ddpm, inpainting=True, resample=3) == RePaint(ddpm, times=3)
    assert repeated(usual, inpainting=False, resample=1) == usual


def test_a_sampler_is_recorded_under_the_name_that_requests_it() -> None:
    assert all(sampler_name(sampler) == name for name, sampler in SAMPLERS.items())
    assert sampler_name(DDIM(eta=0.5)) == "ddim"


@pytest.mark.parametrize(
    "name", ["heun", "churn"]
)  # ddpm itself is a little too narrow in 30 steps
def test_once_is_the_sampler_itself_and_more_keeps_the_distribution(name: str) -> None:
    levels = grid(Linear(), 30)
    x = KeyedNoise(1)(torch.empty(COUNT, 1, 1, 2, dtype=torch.float64))
    once, plain = (
        sample(s, oracle, x, levels, noise=KeyedNoise(2))
        for s in (RePaint(SAMPLERS[name], times=1), SAMPLERS[name])
    )
    assert torch.equal(once, plain)
    thrice = sample(
        RePaint(SAMPLERS[name], times=3), oracle, x, levels, noise=KeyedNoise(2)
    ).flatten(1)
    assert float((torch.cov(thrice.T) - COVARIANCE).abs().max()) < 0.08


@pytest.mark.parametrize("name", ["dpm-solver++2m", "unipc", "multistep2"])
def test_a_sampler_with_memory_is_not_resampled(name: str) -> None:
    with pytest.raises(ConfigError, match="use a sampler without memory"):
        repeated(SAMPLERS[name], inpainting=True, resample=2)
    with pytest.raises(ConfigError, match="use a sampler without memory"):
        RePaint(Churn(UniPC()), times=2)
    with pytest.raises(ConfigError, match="nothing is kept of the images"):
        repeated(SAMPLERS["ddpm"], inpainting=False, resample=2)
