"""How a model of ours is sampled, as a scheduler's configuration: the inverse of `schedulers`.

Only what diffusers does exactly as we do is written. What was written is read again and compared
with the run, so that nothing is said in a way that means something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfumato.config import kind_of
from sfumato.diffusion import (
    Flow,
    FlowTime,
    Linear,
    LinearBetas,
    NoiseLevel,
    ScaledLinear,
    Schedule,
    Shift,
    Timestep,
    UnitSum,
    UnitVariance,
    Warped,
    ZeroTerminalSNR,
)
from sfumato.errors import ConfigError
from sfumato.generation.diffusion_model import DenoiserConfig, SamplingConfig
from sfumato.interop.schedulers import PREDICTIONS, read_scheduler
from sfumato.sampling import (
    DDIM,
    DPMSolverPP2M,
    Even,
    Leading,
    Linspace,
    RoundedLinspace,
    SamplerConfig,
    Spacing,
    Trailing,
    grid,
    sampler_name,
)

WHERE = "export"
CLOSE = 1e-9  # of levels; float64
FLOW_STEPS = 1000  # timesteps of flow matching, where the run does not say


@dataclass(frozen=True)
class Equivalent:
    """A scheduler that takes the very steps of a sampler of ours, on some spacings."""

    scheduler: str
    sampler: SamplerConfig
    spacings: tuple[type[Spacing], ...]
    clips: bool


EQUIVALENTS = (
    Equivalent("DDIMScheduler", DDIM(), (Even, Trailing, Leading), True),
    Equivalent("DDPMScheduler", DDIM(eta=1.0), (Even, Trailing, Leading), True),
    Equivalent(
        "DPMSolverMultistepScheduler", DPMSolverPP2M(), (Even, Trailing, RoundedLinspace), False
    ),
)
SPACINGS: dict[type[Spacing], str] = {
    Even: "trailing",  # where the steps divide the table
    Trailing: "trailing",
    Leading: "leading",
    RoundedLinspace: "linspace",
}


def write_scheduler(denoiser: DenoiserConfig, sampling: SamplingConfig) -> dict[str, Any]:
    """Return the configuration of the scheduler that samples as a run does (scheduler_config.json).

    Raises:
        ConfigError: naming the setting of the run that no scheduler has.
    """
    config = (
        _flow(denoiser, sampling)
        if isinstance(denoiser.noise_input, FlowTime)
        else _table(denoiser, sampling)
    )
    difference = first_difference(config, denoiser, sampling)
    if difference:
        raise ConfigError(
            f"{config['_class_name']} cannot sample as the run does: {difference} would change",
            where=WHERE,
            hint=f"train with other settings of {difference}, or use the format `bundle`",
        )
    return config


def first_difference(
    config: Mapping[str, Any], denoiser: DenoiserConfig, sampling: SamplingConfig
) -> str:
    """Return which setting of a run a scheduler's configuration changes; "" if it changes none.

    Levels are compared at the run's number of steps, or the next smaller that divides the table.
    """
    read = read_scheduler(config, where=WHERE)
    steps = dividing_steps(sampling.steps, config["num_train_timesteps"])
    ours, theirs = _levels(sampling, steps), _levels(read.sampling, steps)
    if ours.alpha.shape != theirs.alpha.shape:
        return "sampling.spacing"
    pairs = {
        "denoiser.parameterization": read.denoiser.parameterization == denoiser.parameterization,
        "sampling.sampler": read.sampling.sampler == sampling.sampler,
        "sampling.clip": read.sampling.clip == sampling.clip,
        "sampling.schedule or sampling.spacing": _close(ours.alpha, theirs.alpha)
        and _close(ours.sigma, theirs.sigma),
    }
    noisy = ours.at(slice(0, -1))
    pairs["denoiser.input_scale"] = _close(
        denoiser.input_scale(noisy), read.denoiser.input_scale(noisy)
    )
    told = denoiser.noise_input(noisy), read.denoiser.noise_input(noisy)
    pairs["denoiser.noise_input"] = _close(*told, tolerance=1e-5)  # of an index, in a table
    return next((name for name, same in pairs.items() if not same), "")


def dividing_steps(steps: int, table_size: int) -> int:
    """Return the largest number of steps, at most `steps`, that divides a table of levels."""
    return next(count for count in range(steps, 0, -1) if table_size % count == 0)


def _levels(sampling: SamplingConfig, steps: int) -> NoiseLevel:
    return grid(sampling.schedule, steps, spacing=sampling.spacing)


def _close(a: Tensor, b: Tensor, tolerance: float = CLOSE) -> bool:
    return bool(torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance))


def _flow(denoiser: DenoiserConfig, sampling: SamplingConfig) -> dict[str, Any]:
    """Write a flow-matching scheduler."""
    if denoiser.parameterization != Flow() or denoiser.input_scale != UnitSum():
        raise _no_equivalent(
            "denoiser", "denoiser.parameterization=flow denoiser.input_scale.kind=unitsum"
        )
    match sampling.schedule:
        case Linear():
            shift = 1.0
        case Warped(schedule=Linear(), warp=Shift(factor=factor)):
            shift = factor
        case _:
            raise _no_equivalent("sampling.schedule", "the linear path, perhaps with a shift")
    size = FLOW_STEPS
    if isinstance(sampling.spacing, Linspace):  # its last level is the first of the table
        size = round((shift - (shift - 1) * sampling.spacing.last) / sampling.spacing.last)
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": size,
        "shift": shift,
        "use_dynamic_shifting": False,
    }


def _table(denoiser: DenoiserConfig, sampling: SamplingConfig) -> dict[str, Any]:
    """Write a scheduler of a table of betas."""
    told = denoiser.noise_input
    if not isinstance(told, Timestep):
        raise ConfigError(
            f"networks of diffusers are told a timestep, and this one was trained with "
            f"denoiser.noise_input={kind_of(type(told))}",
            where=WHERE,
            hint="train with denoiser.noise_input.kind=timestep, or use the format `bundle`",
        )
    if denoiser.input_scale != UnitVariance(1.0):
        raise _no_equivalent("denoiser.input_scale", "denoiser.input_scale.sigma_data=1")
    prediction = next(
        (name for name, kind in PREDICTIONS.items() if kind == denoiser.parameterization), None
    )
    if prediction is None:
        raise _no_equivalent("denoiser.parameterization", "epsilon, sample, or velocity with 1")
    equivalent = next(
        (
            one
            for one in EQUIVALENTS
            if one.sampler == sampling.sampler
            and type(sampling.spacing) in one.spacings
            and one.clips >= sampling.clip
        ),
        None,
    )
    if equivalent is None:
        raise ConfigError(
            f"no scheduler of diffusers takes the steps of {sampler_name(sampling.sampler)} on "
            f"{kind_of(type(sampling.spacing))} spacing" + (" with clip" if sampling.clip else ""),
            where=WHERE,
            hint="; ".join(
                f"{sampler_name(one.sampler)}: {', '.join(kind_of(s) for s in one.spacings)}"
                for one in EQUIVALENTS
            )
            + ". Set sampling.sampler and sampling.spacing.kind",
        )
    return {
        "_class_name": equivalent.scheduler,
        "num_train_timesteps": told.table_size,
        **_betas(told.schedule, told.table_size),
        "prediction_type": prediction,
        **_spacing(sampling.spacing, equivalent),
        **({"clip_sample": sampling.clip} if equivalent.clips else {}),
        **({"clip_sample_range": 1.0} if sampling.clip else {}),
    }


def _betas(schedule: Schedule, size: int) -> dict[str, Any]:
    """Return the keys of a table of betas."""
    rescaled = isinstance(schedule, ZeroTerminalSNR)
    inner = schedule.schedule if isinstance(schedule, ZeroTerminalSNR) else schedule
    kinds = {LinearBetas: "linear", ScaledLinear: "scaled_linear"}
    keys: dict[str, Any] = {"rescale_betas_zero_snr": True} if rescaled else {}
    if isinstance(inner, LinearBetas | ScaledLinear) and inner.steps == size:
        return {
            "beta_schedule": kinds[type(inner)],
            "beta_start": inner.beta_start,
            "beta_end": inner.beta_end,
            **keys,
        }
    alpha, sigma = inner(torch.arange(size + 1, dtype=torch.float64) / size)
    bars = alpha.square() / (alpha.square() + sigma.square())
    return {"trained_betas": (1 - bars[1:] / bars[:-1]).clamp(0, 0.999999).tolist(), **keys}


def _spacing(spacing: Spacing, equivalent: Equivalent) -> dict[str, Any]:
    """Return the keys of a spacing."""
    keys: dict[str, Any] = {"timestep_spacing": SPACINGS[type(spacing)]}
    if isinstance(spacing, Leading):
        keys["steps_offset"] = spacing.offset
    if equivalent.scheduler == "DDIMScheduler":
        keys["set_alpha_to_one"] = not (isinstance(spacing, Leading) and spacing.end == "first")
    return keys


def _no_equivalent(key: str, legal: str) -> ConfigError:
    return ConfigError(
        f"{key} of this run has no equivalent in the schedulers of diffusers",
        where=WHERE,
        hint=f"they have {legal}; or use the format `bundle`",
    )
