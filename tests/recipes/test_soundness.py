"""What only the parts of a run together can answer is refused with its configuration: no data are
read for it.
"""

import re

import pytest
import torch

from sfumato.conditioners import CategoryConfig, DoodleConfig
from sfumato.contexts import ContextConfig
from sfumato.diffusion import (
    Cosine,
    Epsilon,
    Flow,
    Geometric,
    Karras,
    Linear,
    LinearBetas,
    NetworkDenoiser,
    Sample,
    UniformLogSNR,
    Velocity,
)
from sfumato.errors import ConfigError, ScheduleError
from sfumato.generation.diffusion_model import DenoiserConfig, SamplingConfig
from sfumato.recipes import Run, resolve
from sfumato.recipes.config_checks import require_sampled
from sfumato.sampling import SAMPLERS, grid, sample

STEPS = 20  # more than are walked, so that the ends speak for the middle
SHAPE = (1, 1, 2, 2)


def refusal(*overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        resolve("digits", overrides)
    return caught.value


def walked(denoiser: DenoiserConfig, sampling: SamplingConfig) -> bool:
    """Whether a network of zeros comes to finite samples in all steps: what `require_sampled`
    foresees from a few.
    """
    network = NetworkDenoiser(
        network=lambda x, noise_input, condition: torch.zeros_like(x),
        parameterization=denoiser.parameterization,
        input_scale=denoiser.input_scale,
    )
    levels = grid(sampling.schedule, sampling.steps)
    try:
        made = sample(sampling.sampler, network, torch.full(SHAPE, float(levels.sigma[0])), levels)
    except ScheduleError:
        return False
    return bool(made.isfinite().all())


@pytest.mark.parametrize("sampler", ["ddpm", "heun", "multistep3", "unipc"])
@pytest.mark.parametrize("parameterization", [Epsilon(), Sample(), Flow(), Velocity()])
def test_a_configuration_is_refused_exactly_if_its_samples_fail(
    sampler: str, parameterization
) -> None:
    for schedule in (Linear(), Cosine(), LinearBetas(), Karras(), UniformLogSNR(), Geometric()):
        denoiser = DenoiserConfig(parameterization=parameterization)
        sampling = SamplingConfig(sampler=SAMPLERS[sampler], schedule=schedule, steps=STEPS)
        if walked(denoiser, sampling):
            require_sampled(denoiser, sampling, Linear())
        else:
            with pytest.raises(ConfigError, match=r"^sampling\.schedule"):
                require_sampled(denoiser, sampling, Linear())


@pytest.mark.parametrize(
    "overrides",
    [
        ["denoiser.parameterization=Epsilon"],
        ["denoiser.parameterization=Epsilon", "objective.schedule=LinearBetas"],
        ["sampling.sampler={kind: churn, sampler: {kind: runge-kutta, parameterization: Epsilon}}"],
        ["sampling.sampler={kind: runge-kutta, parameterization: Epsilon}"],
        ["sampling.sampler={kind: multistep, parameterization: Epsilon}"],
    ],
)
def test_every_way_out_that_is_named_is_one(overrides: list[str]) -> None:
    error = refusal(*overrides)
    assert error.where == "sampling.schedule"
    ways = re.findall(r"[\w.]+=\S+?(?=,|$)", error.hint)
    assert len(ways) >= 2
    for way in ways:
        resolve("digits", [*overrides, way])


def test_the_schedule_that_a_network_is_trained_on_is_offered_first() -> None:
    error = refusal("denoiser.parameterization=Epsilon", "objective.schedule=Karras")
    assert error.hint.startswith("set sampling.schedule=karras, ")


def test_a_loss_that_is_not_finite_is_refused_with_the_share_of_levels() -> None:
    error = refusal(
        "denoiser.parameterization=Sample", "objective.schedule={kind: geometric, ratio: 0.5}"
    )
    assert error.where == "objective.schedule"
    assert re.search(
        r"not finite at \d+\.\d+% of the noise levels of geometric, such as alpha = 1, sigma = ",
        error.what,
    )
    resolve(
        "digits",
        ["denoiser.parameterization=Flow", "objective.schedule={kind: geometric, ratio: 0.5}"],
    )


def test_guidance_away_from_what_training_never_sees_is_refused() -> None:
    error = refusal("sampling.guidance=3", "conditioner.category.dropout=0")
    assert error.where == "sampling.guidance"
    assert (
        "needs an unconditional prediction for category, but its dropout is 0, so it was never "
        "trained" in error.what
    )
    assert error.hint == "set conditioner.category.dropout=0.1, or sampling.guidance=1"
    resolve("digits", ["sampling.guidance=1", "conditioner.category.dropout=0"])
    resolve("digits", ["sampling.guidance=3", "conditioner.category.dropout=0.05"])


def test_a_run_made_in_python_is_refused_as_one_that_is_parsed() -> None:
    both = ContextConfig(category=CategoryConfig(dropout=0.0), doodle=DoodleConfig(dropout=0.0))
    with pytest.raises(
        ConfigError,
        match="unconditional prediction for category and doodle, but their dropout is 0",
    ):
        Run(name="x", conditioner=both, sampling=SamplingConfig(guidance=2.0))
    unguided = ContextConfig(doodle=DoodleConfig(dropout=0.0, guided=False))
    assert Run(name="x", conditioner=unguided, sampling=SamplingConfig(guidance=2.0)).name == "x"
    with pytest.raises(ConfigError, match=r"^sampling\.schedule"):
        Run(name="x", denoiser=DenoiserConfig(parameterization=Epsilon()))
