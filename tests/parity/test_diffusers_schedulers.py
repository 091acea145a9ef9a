"""Our samplers against diffusers' schedulers, both run here, on one network, from the same noise,
compared at every step.

What diffusers spreads over scheduler classes and flags is, for us, a grid of levels. So each test
reads the grid off a live
scheduler, hands it to `sample`, and tells the network the timestep that the scheduler has for that
level.

Precision: the schedulers build float32 tables. We take these values as the levels, and widen them
in the scheduler too, so that
its arithmetic is float64 (EXACT). Euler, flow matching and DPM-Solver cast the sample to float32
inside `step`, at every step:
there, and only there, agreement ends at float32 rounding (SINGLE; with the cast removed it is
1e-15).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sfumato.condition import Condition
from sfumato.diffusion.denoiser import Angle, NetworkDenoiser, UnitSum, UnitVariance
from sfumato.diffusion.noise_level import NoiseLevel
from sfumato.diffusion.parameterizations import Epsilon, Flow, Sample, Velocity
from sfumato.diffusion.schedules import Karras, Linear, LinearBetas, ScaledLinear, Shift, Warped
from sfumato.interop.schedulers import read_scheduler
from sfumato.sampling import DDIM, DPMSolverPP2M, Multistep, RungeKutta, Sampler, grid, sample

# its schedulers only: pipelines would want torchvision
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

EXACT, SINGLE = 1e-9, 1e-6
# divides 1000: DDIM's previous timestep is t - 1000 // steps, which is off its own grid otherwise
STEPS = 20
PREDICTS = {
    "epsilon": Epsilon(),
    "v_prediction": Velocity(),
    "sample": Sample(),
    "flow_prediction": Flow(),
}
DISCRETE = ("epsilon", "v_prediction", "sample")


class FixedNetwork(nn.Module):
    """Random weights, float64, non-linear in x and dependent on the timestep."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 3, 3, padding=1)
            self.timestep = nn.Linear(6, 12)
        self.double().requires_grad_(False)

    def forward(self, x: Tensor, timestep: Tensor, condition: Condition | None = None) -> Tensor:
        angle = (
            timestep.double().view(-1, 1)
            / 1000
            * torch.tensor([1.0, 4.0, 16.0], dtype=torch.float64)
        )
        shift = self.timestep(torch.cat([angle.sin(), angle.cos()], dim=1))[:, :, None, None]
        return 0.5 * x + self.last(torch.tanh(self.first(x) + shift))


NETWORK = FixedNetwork()


def normal(seed: int) -> Tensor:
    return torch.randn(
        (2, 3, 8, 8), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def prepared(scheduler, steps: int = STEPS, **options):
    """Set the timesteps, then widen the tables (`set_timesteps` rebuilds some of them)."""
    scheduler.set_timesteps(steps, **options)
    for name in ("alphas_cumprod", "final_alpha_cumprod", "one", "sigmas"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


def variance_preserving(scheduler) -> NoiseLevel:
    """The grid of DDPM and DDIM: their table at their timesteps, then clean data."""
    table = torch.cat(
        [scheduler.alphas_cumprod[scheduler.timesteps], torch.ones(1, dtype=torch.float64)]
    )
    return NoiseLevel(table.sqrt(), (1 - table).sqrt())


def variance_exploding(scheduler) -> NoiseLevel:
    """The grid of Euler and its kin, x = x0 + sigma eps."""
    return NoiseLevel(torch.ones_like(scheduler.sigmas), scheduler.sigmas)


def unit_variance(scheduler) -> NoiseLevel:
    """The grid of DPM-Solver and DEIS, whose sigmas are Euler's but whose samples are of unit
    variance.
    """
    alpha = (1 + scheduler.sigmas**2).rsqrt()
    return NoiseLevel(alpha, alpha * scheduler.sigmas)


def straight(scheduler) -> NoiseLevel:
    """The grid of flow matching, x = (1 - sigma) x0 + sigma eps."""
    return NoiseLevel(1 - scheduler.sigmas, scheduler.sigmas)


def timestep_of(levels: NoiseLevel, timesteps: Tensor) -> Callable[[NoiseLevel], Tensor]:
    """Level -> the scheduler's timestep for it, by a monotone function of the log-SNR that is
    finite at pure noise.
    """
    table = Angle()(levels)[: len(timesteps)]

    def look_up(level: NoiseLevel) -> Tensor:
        distance, index = (table - Angle()(level)).abs().min(dim=0)
        assert distance < 1e-8, "our sampler asked for a level that the scheduler does not visit"
        return timesteps[index]

    return look_up


def theirs(scheduler, x: Tensor, noise: Iterable[Tensor] = (), **options) -> list[Tensor]:
    """The scheduler's states after each of its steps, its random draws replaced by `noise`."""
    draws, module, states = iter(noise), sys.modules[type(scheduler).__module__], []
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "randn_tensor", lambda *_, **__: next(draws), raising=False)
        for t in scheduler.timesteps:
            output = NETWORK(scale(x, t), t.expand(len(x)))
            x = scheduler.step(output, t, x, **options).prev_sample
            states.append(x)
    return states


def ours(
    sampler: Sampler, predicts: str, levels: NoiseLevel, timesteps: Tensor, x: Tensor, noise=()
) -> list[Tensor]:
    """Our states after each step on the same grid."""
    denoiser = NetworkDenoiser(
        network=NETWORK,
        parameterization=PREDICTS[predicts],
        input_scale=UnitSum() if predicts == "flow_prediction" else UnitVariance(),
        noise_input=timestep_of(levels, timesteps),
    )
    draws, states = iter(noise), []
    sample(
        sampler,
        denoiser,
        x,
        levels,
        noise=lambda x: next(draws),
        on_step=lambda progress: states.append(progress.x),
    )
    return states


def deviation(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference along two trajectories, each step relative to its own largest
    value.
    """
    assert len(a) == len(b) > 0
    assert all(state.dtype == torch.float64 for state in a)
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(a, b, strict=True))


def compared(scheduler, sampler: Sampler, to_levels, predicts: str, **options) -> float:
    """Deviation between the two from the same starting noise and the same draws."""
    levels = to_levels(scheduler)
    start, noise = levels.sigma[0] * normal(1), [normal(2 + i) for i in range(len(levels.sigma))]
    mine = ours(sampler, predicts, levels, scheduler.timesteps, start, noise)
    return deviation(mine, theirs(scheduler, start, noise, **options))


# DDPM and DDIM.
# clip_sample=True (default) clamps x0, which is `ClampX0` here and no part of a solver.
# timestep_spacing="trailing" starts at t = 999; the default, "leading", starts below the noisiest
# level.
# set_alpha_to_one=True (default) ends on clean data.


@pytest.mark.parametrize("predicts", DISCRETE)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(predicts: str, eta: float):
    scheduler = prepared(
        diffusers.DDIMScheduler(
            clip_sample=False, timestep_spacing="trailing", prediction_type=predicts
        )
    )
    assert compared(scheduler, DDIM(eta), variance_preserving, predicts, eta=eta) < EXACT


@pytest.mark.parametrize(
    "eta", [0.0, 0.5]
)  # at eta = 1 their sqrt(1 - alpha'^2 - std^2) is sqrt(rounding) = 1e-8, ours 0
def test_ddim_from_pure_noise(eta: float):
    # rescale_betas_zero_snr needs "trailing" to visit t = 999, where alpha = 0, and v_prediction to
    # survive it.
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler = prepared(
        diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **options)
    )
    assert variance_preserving(scheduler).alpha[0] == 0
    assert compared(scheduler, DDIM(eta), variance_preserving, "v_prediction", eta=eta) < EXACT


def test_ddim_with_stable_diffusions_options():
    # set_alpha_to_one=False with "leading": their last step goes from t = 0 to t = 0 and stands
    # still; our grid stops there.
    scheduler = prepared(
        diffusers.DDIMScheduler(
            clip_sample=False, set_alpha_to_one=False, beta_schedule="scaled_linear"
        )
    )
    levels, start = variance_preserving(scheduler).at(slice(0, -1)), normal(1)
    reference = theirs(scheduler, start)
    assert deviation(reference[-1:], reference[-2:-1]) < EXACT
    assert (
        deviation(ours(DDIM(), "epsilon", levels, scheduler.timesteps, start), reference[:-1])
        < EXACT
    )


@pytest.mark.parametrize("predicts", DISCRETE)
def test_ddpm(predicts: str):
    # variance_type="fixed_small" (default) is eta = 1; "fixed_large" is no posterior's variance and
    # has no counterpart.
    # Their last step still adds noise, of variance clamped from 0 to 1e-20: the 1e-10 that is seen
    # here.
    scheduler = prepared(
        diffusers.DDPMScheduler(
            clip_sample=False, timestep_spacing="trailing", prediction_type=predicts
        )
    )
    assert compared(scheduler, DDIM(eta=1.0), variance_preserving, predicts) < EXACT


# Euler, Heun, linear multistep: x = x0 + sigma eps.
# init_noise_sigma is sigma_max under "linspace" (default) and sqrt(sigma_max^2 + 1) under
# "leading"; both sides get one x here.
# use_karras_sigmas makes timesteps fractional: the network must take them.


@pytest.mark.parametrize("predicts", DISCRETE)
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("sampler", [DDIM(), RungeKutta("euler", parameterization=Epsilon())])
def test_euler(predicts: str, karras: bool, sampler: Sampler):
    scheduler = prepared(
        diffusers.EulerDiscreteScheduler(prediction_type=predicts, use_karras_sigmas=karras)
    )
    assert compared(scheduler, sampler, variance_exploding, predicts) < SINGLE


@pytest.mark.parametrize(
    "predicts", ["epsilon", "v_prediction"]
)  # "sample" is not implemented there
def test_euler_ancestral(predicts: str):
    scheduler = prepared(diffusers.EulerAncestralDiscreteScheduler(prediction_type=predicts))
    assert compared(scheduler, DDIM(eta=1.0), variance_exploding, predicts) < SINGLE


@pytest.mark.parametrize("predicts", DISCRETE)
@pytest.mark.parametrize("karras", [False, True])
def test_heun(predicts: str, karras: bool):
    # It lists every inner level twice, one entry for each stage, and steps to sigma = 0 in one
    # stage, as our driver does.
    scheduler = prepared(
        diffusers.HeunDiscreteScheduler(prediction_type=predicts, use_karras_sigmas=karras)
    )
    sigmas = torch.cat([scheduler.sigmas[::2], scheduler.sigmas[-1:]])
    levels, start = NoiseLevel(torch.ones_like(sigmas), sigmas), sigmas[0] * normal(1)
    states = theirs(scheduler, start)
    mine = ours(
        RungeKutta("heun", parameterization=Epsilon()),
        predicts,
        levels,
        scheduler.timesteps[::2],
        start,
    )
    assert deviation(mine, states[1::2] + states[-1:]) < EXACT


@pytest.mark.parametrize("order", [2, 3, 4])
def test_linear_multistep(order: int):
    # Their last step extrapolates to sigma = 0, ours takes x0: everything before it agrees.
    scheduler = prepared(diffusers.LMSDiscreteScheduler())
    levels, start = variance_exploding(scheduler), scheduler.sigmas[0] * normal(1)
    adams = Multistep(order, parameterization=Epsilon(), exponential=False)
    mine = ours(adams, "epsilon", levels, scheduler.timesteps, start)
    assert deviation(mine[:-1], theirs(scheduler, start, order=order)[:-1]) < EXACT


# DPM-Solver++ and DEIS: samples of unit variance.
# final_sigmas_type="zero" (default) makes the last step first-order, which is our driver's;
# "sigma_min" would stop short of clean.
# lower_order_final concerns order 2 only through that last step. use_karras_sigmas rounds timesteps
# to integers.


@pytest.mark.parametrize("predicts", DISCRETE)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(("steps", "karras"), [(10, False), (20, False), (20, True)])
def test_dpm_solver_pp_2m(predicts: str, eta: float, steps: int, karras: bool):
    options = {
        "algorithm_type": "sde-dpmsolver++" if eta else "dpmsolver++",
        "use_karras_sigmas": karras,
    }
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type=predicts, **options)
    assert (
        compared(prepared(scheduler, steps), DPMSolverPP2M(eta), unit_variance, predicts) < SINGLE
    )


def test_dpm_solver_pp_2m_on_the_straight_path():
    scheduler = prepared(
        diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        )
    )
    assert compared(scheduler, DPMSolverPP2M(), straight, "flow_prediction") < SINGLE


@pytest.mark.parametrize("predicts", DISCRETE)
@pytest.mark.parametrize("order", [2, 3])
def test_deis(predicts: str, order: int):
    # lower_order_final lowers the order of the last two steps below 15 steps; 20 steps keep it. It
    # never ends on clean data.
    scheduler = prepared(
        diffusers.DEISMultistepScheduler(prediction_type=predicts, solver_order=order)
    )
    assert (
        compared(scheduler, Multistep(order, parameterization=Epsilon()), unit_variance, predicts)
        < EXACT
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampler", [DDIM(), RungeKutta("euler", parameterization=Flow())])
def test_flow_matching(shift: float, sampler: Sampler):
    # Without explicit sigmas it shifts its last one twice. Those given here, as SD3's and Flux's
    # pipelines do, make our grid.
    scheduler = prepared(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
        sigmas=np.linspace(1, 1 / STEPS, STEPS),
    )
    levels = grid(Warped(schedule=Linear(), warp=Shift(shift)), STEPS)
    torch.testing.assert_close(levels.sigma, scheduler.sigmas, rtol=1e-6, atol=0)
    assert compared(scheduler, sampler, straight, "flow_prediction") < SINGLE
    assert compared(prepared(scheduler), sampler, straight, "flow_prediction") < SINGLE


@pytest.mark.parametrize(
    ("schedule", "name"), [(LinearBetas(), "linear"), (ScaledLinear(), "scaled_linear")]
)
def test_tables_of_betas(schedule: LinearBetas | ScaledLinear, name: str):
    table = diffusers.DDPMScheduler(
        schedule.steps, schedule.beta_start, schedule.beta_end, name
    ).alphas_cumprod
    levels = schedule(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    # theirs is a float32 product of 1000
    torch.testing.assert_close(levels.alpha**2, table.double(), rtol=2e-6, atol=0)


def test_karras_grid():
    sigmas = prepared(diffusers.EulerDiscreteScheduler(use_karras_sigmas=True)).sigmas
    levels = grid(Karras(sigma_min=float(sigmas[-2]), sigma_max=float(sigmas[0])), STEPS)
    torch.testing.assert_close(levels.sigma, sigmas, rtol=1e-6, atol=0)


def test_the_comparison_can_fail():
    def against_ddim(sampler: Sampler, noise_from: int = 2, nudge: float = 0.0) -> float:
        scheduler = prepared(
            diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
        )
        levels, start = variance_preserving(scheduler), normal(1)
        states = theirs(scheduler, start, [normal(2 + i) for i in range(STEPS)], eta=1.0)
        levels.sigma[STEPS // 2] *= 1 + nudge
        noise = [normal(noise_from + i) for i in range(STEPS)]
        return deviation(
            ours(sampler, "epsilon", levels, scheduler.timesteps, start, noise), states
        )

    assert against_ddim(DDIM(eta=1.0)) < EXACT
    assert against_ddim(DDIM(eta=0.5)) > 1e-2
    assert against_ddim(DPMSolverPP2M(eta=1.0)) > 1e-2
    assert against_ddim(DDIM(eta=1.0), noise_from=3) > 1e-2
    assert against_ddim(DDIM(eta=1.0), nudge=1e-5) > 1e3 * EXACT


@pytest.mark.parametrize("offset", [0, 1])
def test_ddim_that_ends_at_the_first_entry_of_its_table(offset: int) -> None:
    """Without an offset, its last step leads from the first entry to itself: we leave it out."""
    scheduler = prepared(
        diffusers.DDIMScheduler(set_alpha_to_one=False, steps_offset=offset, clip_sample=False)
    )
    config = {**scheduler.config, "_class_name": "DDIMScheduler"}
    sampling = read_scheduler(config, where="here").sampling
    levels = grid(sampling.schedule, STEPS, spacing=sampling.spacing)
    x = normal(1)
    states = theirs(scheduler, x)
    found = ours(sampling.sampler, "epsilon", levels, scheduler.timesteps, x)
    assert len(found) == STEPS - (offset == 0)
    last_step = float((states[-1] - states[-2]).abs().max())
    assert (last_step < 1e-12) == (offset == 0)
    for state, same in zip(found, states, strict=False):
        # their table is float32, and values grow to 15
        assert float((state - same).abs().max() / same.abs().max()) < 1e-5
    assert float((found[-1] - states[-1]).abs().max() / states[-1].abs().max()) < 1e-5
