"""Checks of a run's parts in combination, before any data are read.

Can it be sampled, is its loss finite, and are the unconditional predictions of guidance trained?
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfumato.condition import Condition
from sfumato.config import kind_of
from sfumato.diffusion import (
    Cosine,
    Flow,
    Karras,
    Linear,
    LinearBetas,
    NetworkDenoiser,
    NoiseLevel,
    Schedule,
    Velocity,
    target_weight,
)
from sfumato.errors import ConfigError, ScheduleError
from sfumato.generation.diffusion_model import DenoiserConfig, SamplingConfig
from sfumato.sampling import DDIM, DPMSolverPP2M, grid, sample

if TYPE_CHECKING:
    from sfumato.recipes.run import Run

CHECKED_STEPS = 8  # at either end of a trajectory, where infinite values occur
# times at which the loss's weight is checked, each in the middle of as many equal parts of [0, 1]
LEVELS = 1024


def require_sampled(
    denoiser: DenoiserConfig, sampling: SamplingConfig, trained_on: Schedule
) -> None:
    """Raise ConfigError unless the sampler can follow its schedule with this network.

    Args:
        trained_on: the schedule of the objective; one of its kind is the first suggestion.
    """
    reason = _obstacle(denoiser, sampling)
    if reason is None:
        return
    others = _others(denoiser, sampling, trained_on)
    ways = [way for way, predicted, sampled in others if _obstacle(predicted, sampled) is None]
    raise ConfigError(
        f"{_name(sampling.sampler)} cannot sample along {_name(sampling.schedule)} with a "
        "network that predicts "
        f"{_name(denoiser.parameterization)}: {reason}",
        where="sampling.schedule",
        hint=f"set {', or '.join(ways) or 'another sampling.schedule, sampling.sampler or denoiser.parameterization'}",
    )


def _name(part: Any) -> str:
    """Return the kind of a part of a configuration, with the kinds inside it."""
    inner = [
        _name(value) for field in fields(part) if is_dataclass(value := getattr(part, field.name))
    ]
    return kind_of(type(part)) + (f"({', '.join(inner)})" if inner else "")


def _others(
    denoiser: DenoiserConfig, sampling: SamplingConfig, trained_on: Schedule
) -> Iterator[tuple[str, DenoiserConfig, SamplingConfig]]:
    """Yield settings that differ in one key, with that key."""
    usual: tuple[Schedule, ...] = (LinearBetas(), Karras(), Linear(), Cosine())
    for schedule in [schedule for schedule in usual if type(schedule) is type(trained_on)] or usual[
        :2
    ]:
        yield f"sampling.schedule={_name(schedule)}", denoiser, replace(sampling, schedule=schedule)
    for sampler in (DPMSolverPP2M(), DDIM()):
        yield f"sampling.sampler={_name(sampler)}", denoiser, replace(sampling, sampler=sampler)
    for parameterization in (Velocity(), Flow()):
        key = f"denoiser.parameterization={_name(parameterization)}"
        yield key, replace(denoiser, parameterization=parameterization), sampling


def _obstacle(denoiser: DenoiserConfig, sampling: SamplingConfig) -> str | None:
    """Return why a trajectory cannot be sampled, or None if it can.

    Both of its ends are sampled with a network that predicts zeros.
    """
    network = NetworkDenoiser(
        network=_zeros,
        parameterization=denoiser.parameterization,
        input_scale=denoiser.input_scale,
        noise_input=denoiser.noise_input,
    )
    try:
        levels = _ends(grid(sampling.schedule, sampling.steps, spacing=sampling.spacing))
        x = torch.full((1, 1, 2, 2), float(levels.sigma[0]))
        sampled = sample(sampling.sampler, network, x, levels)
    except ScheduleError as error:
        return error.what
    return (
        None
        if bool(sampled.isfinite().all())
        else "sampling with these settings produces NaN or infinity"
    )


def _zeros(x: Tensor, noise_input: Tensor, condition: Condition) -> Tensor:
    return torch.zeros_like(x)


def _ends(levels: NoiseLevel) -> NoiseLevel:
    """Return the first and last levels of a grid."""
    alpha, sigma = levels
    if len(alpha) <= 2 * CHECKED_STEPS + 2:
        return levels
    return NoiseLevel(
        *(
            torch.cat([part[: CHECKED_STEPS + 1], part[-CHECKED_STEPS - 1 :]])
            for part in (alpha, sigma)
        )
    )


def require_finite_loss(run: Run) -> None:
    """Raise ConfigError if the loss's weight is not finite at levels that training draws.

    It is computed in float32, as in training.
    """
    times = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    drawn = NoiseLevel(*(part.float() for part in run.objective.schedule(times)))
    weight = target_weight(run.objective.weighting, drawn, run.denoiser.parameterization)
    inputs = run.denoiser.noise_input(drawn) + run.denoiser.input_scale(drawn)
    infinite = ~(weight.isfinite() & inputs.isfinite())
    if bool(infinite.any()):
        first = int(torch.nonzero(infinite)[0])
        schedule, weighting, predicted = map(
            _name, (run.objective.schedule, run.objective.weighting, run.denoiser.parameterization)
        )
        raise ConfigError(
            f"the loss is not finite at {float(infinite.double().mean()):.2%} of the noise levels of "
            f"{schedule}, such as "
            f"alpha = {float(drawn.alpha[first]):.3g}, sigma = {float(drawn.sigma[first]):.3g}: "
            f"{weighting} with a network that "
            f"predicts {predicted}",
            where="objective.schedule",
            hint="use levels further from the ends, such as {kind: warped, schedule: ..., warp: "
            "{kind: span, low: 0.01, high: 0.99}}, "
            "or denoiser.parameterization=Flow",
        )


def require_guidable(run: Run) -> None:
    """Raise ConfigError if guidance needs an unconditional prediction that is never trained, since
    the dropout of a context is 0. Contexts that guidance keeps in all predictions need none.
    """
    never = unguidable(run)
    if run.sampling.guidance != 1 and never:
        keys = ", ".join(f"conditioner.{name}.dropout=0.1" for name in never)
        raise ConfigError(
            f"guidance {run.sampling.guidance:g} needs an unconditional prediction for "
            f"{' and '.join(never)}, but {'its' if len(never) == 1 else 'their'} dropout is 0, so "
            "it was never trained",
            where="sampling.guidance",
            hint=f"set {keys}, or sampling.guidance=1",
        )


def unguidable(run: Run) -> list[str]:
    """Return the contexts whose unconditional prediction is never trained, so that guidance cannot
    lead away from it.
    """
    configs = {name: getattr(run.conditioner, name) for name in run.conditioner.user_inputs}
    return [
        name
        for name, config in configs.items()
        if config.dropout == 0 and getattr(config, "guided", True)
    ]


def require_storage(run: Run) -> None:
    """Raise ConfigError if weights would be trained, or taken over from a run, that are stored in
    fewer bits.
    """
    stored = run.network.frozen_in
    if stored and not run.adapter.needs_base:
        raise ConfigError(
            f"{stored} is for frozen weights: steps of training are smaller than what it rounds "
            "off, and adapter.kind=none trains all weights",
            where="network.base_dtype",
            hint="set network.base_dtype=float32 (precision=bfloat16 computes in bfloat16), or "
            "adapter.kind=lora",
        )
    if stored and run.base:
        raise ConfigError(
            f"{stored} is for the weights of a folder, and the base is a run",
            where="network.base_dtype",
            hint="fine-tune a folder of it: sfumato export RUN --format diffusers",
        )
