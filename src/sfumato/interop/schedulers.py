"""Scheduler configurations of diffusers as schedules, parameterizations, grids and samplers.

A scheduler class of diffusers is four things at once. Here each of its keys is either understood,
known to change nothing on the way, or refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sfumato.diffusion import (
    Epsilon,
    Flow,
    FlowTime,
    Linear,
    LinearBetas,
    ParameterizationConfig,
    Sample,
    ScaledLinear,
    Schedule,
    Shift,
    Tabulated,
    Timestep,
    UnitSum,
    UnitVariance,
    Velocity,
    Warped,
    ZeroTerminalSNR,
)
from sfumato.errors import ConfigError
from sfumato.generation.diffusion_model import DenoiserConfig, SamplingConfig
from sfumato.sampling import (
    DDIM,
    DPMSolverPP2M,
    Even,
    Leading,
    Linspace,
    RoundedLinspace,
    SamplerConfig,
    Spacing,
)

PREDICTIONS: dict[str, ParameterizationConfig] = {
    "epsilon": Epsilon(),
    "v_prediction": Velocity(),
    "sample": Sample(),
}
FLOW = ("FlowMatchEulerDiscreteScheduler",)
# their sampler, or the one used in its place
SAMPLERS: dict[str, SamplerConfig] = {
    "DDPMScheduler": DDIM(eta=1.0),
    "DDIMScheduler": DDIM(),
    "EulerDiscreteScheduler": DDIM(),
    "EulerAncestralDiscreteScheduler": DDIM(eta=1.0),
    "DPMSolverMultistepScheduler": DPMSolverPP2M(),
    "PNDMScheduler": DPMSolverPP2M(),
    "UniPCMultistepScheduler": DPMSolverPP2M(),
    "LMSDiscreteScheduler": DPMSolverPP2M(),
    "HeunDiscreteScheduler": DPMSolverPP2M(),
}
REPLACED = (
    "PNDMScheduler",
    "UniPCMultistepScheduler",
    "LMSDiscreteScheduler",
    "HeunDiscreteScheduler",
)
CLIPPING = ("DDPMScheduler", "DDIMScheduler")
# classes whose default spacing is `linspace`; that of others is `leading`
LINSPACE = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "LMSDiscreteScheduler",
    "HeunDiscreteScheduler",
)
# keys that would change the path of the levels, and the values that do not
REFUSED: dict[str, tuple[Any, ...]] = {
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "thresholding": (False, None),
    "snr_shift_scale": (1.0, None),
    "use_dynamic_shifting": (False, None),
    "invert_sigmas": (False, None),
    "shift_terminal": (None,),
}


@dataclass(frozen=True, kw_only=True)
class ReadScheduler:
    """What a scheduler's configuration says.

    Attributes:
        schedule: the levels that the network was trained on.
        denoiser: how the network is read.
        sampling: steps are left at their default.
        remarks: lines that say what was replaced.
    """

    schedule: Schedule
    denoiser: DenoiserConfig
    sampling: SamplingConfig
    remarks: tuple[str, ...] = ()


def read_scheduler(config: Mapping[str, Any], *, where: str) -> ReadScheduler:
    """Read the configuration of a scheduler (scheduler_config.json).

    Raises:
        ConfigError: for a class or a key that is not supported.
    """
    name = str(config.get("_class_name", ""))
    for key, harmless in REFUSED.items():
        if key in config and config[key] not in harmless:
            raise ConfigError(
                f"{key} = {config[key]!r} is not supported",
                where=where,
                hint="set it to its default in scheduler_config.json, or use another scheduler",
            )
    if name in FLOW:
        return _flow(config)
    if name not in SAMPLERS:
        raise ConfigError(
            f"unsupported scheduler class {name!r}",
            where=where,
            hint=f"supported are {', '.join([*SAMPLERS, *FLOW])}",
        )
    return _table(name, config, where)


def _flow(config: Mapping[str, Any]) -> ReadScheduler:
    """Read a flow-matching scheduler with a constant shift.

    Its grid is even from 1 to its smallest level, which is shifted already, and is then shifted
    once more, as diffusers does.
    """
    shift, size = float(config.get("shift", 1.0)), int(config.get("num_train_timesteps", 1000))
    schedule: Schedule = Linear() if shift == 1 else Warped(schedule=Linear(), warp=Shift(shift))
    smallest = float(schedule(torch.tensor(1 / size, dtype=torch.float64)).sigma)
    return ReadScheduler(
        schedule=schedule,
        denoiser=DenoiserConfig(
            parameterization=Flow(), input_scale=UnitSum(), noise_input=FlowTime()
        ),
        sampling=SamplingConfig(sampler=DDIM(), schedule=schedule, spacing=Linspace(last=smallest)),
    )


def _table(name: str, config: Mapping[str, Any], where: str) -> ReadScheduler:
    size = int(config.get("num_train_timesteps", 1000))
    schedule = _betas(config, size, where)
    if config.get("rescale_betas_zero_snr"):
        schedule = ZeroTerminalSNR(schedule, fixed=1 / size)
    prediction = str(config.get("prediction_type", "epsilon"))
    if prediction not in PREDICTIONS:
        raise ConfigError(
            f"prediction_type = {prediction!r} is not supported",
            where=where,
            hint=f"supported are {', '.join(PREDICTIONS)}",
        )
    remarks = []
    if name in REPLACED:
        remarks.append(f"{name} is replaced by the sampler dpm-solver++2m on the same levels")
    clip = name in CLIPPING and bool(config.get("clip_sample", True))
    if clip and float(config.get("clip_sample_range", 1.0)) != 1:
        raise ConfigError(
            f"clip_sample_range = {config['clip_sample_range']} is not supported",
            where=where,
            hint="set clip_sample=false, or a range of 1",
        )
    if clip and name == "DDIMScheduler":
        remarks.append(
            "guesses of the clean image are clamped, and the noise follows from them, as with "
            "use_clipped_model_output in diffusers"
        )
    return ReadScheduler(
        schedule=schedule,
        denoiser=DenoiserConfig(
            parameterization=PREDICTIONS[prediction],
            input_scale=UnitVariance(1.0),
            noise_input=Timestep(schedule=schedule, table_size=size),
        ),
        sampling=SamplingConfig(
            sampler=SAMPLERS[name],
            schedule=schedule,
            spacing=_spacing(name, config, size),
            clip=clip,
        ),
        remarks=tuple(remarks),
    )


def _betas(config: Mapping[str, Any], size: int, where: str) -> Schedule:
    """Return the schedule of a table of betas."""
    if config.get("trained_betas") is not None:
        return _tabulated(torch.tensor(config["trained_betas"], dtype=torch.float64))
    kind = config.get("beta_schedule", "linear")
    first, last = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    if kind == "linear":
        return LinearBetas(beta_start=first, beta_end=last, steps=size)
    if kind == "scaled_linear":
        return ScaledLinear(beta_start=first, beta_end=last, steps=size)
    if kind == "squaredcos_cap_v2":
        # Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 17, betas capped at 0.999
        times = torch.arange(size + 1, dtype=torch.float64) / size
        bars = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
        return _tabulated((1 - bars[1:] / bars[:-1]).clamp(max=0.999))
    raise ConfigError(
        f"beta_schedule = {kind!r} is not supported",
        where=where,
        hint="supported are linear, scaled_linear and squaredcos_cap_v2",
    )


def _tabulated(betas: torch.Tensor) -> Tabulated:
    bars = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
    return Tabulated(alphas=tuple(bars.sqrt().tolist()), sigmas=tuple((1 - bars).sqrt().tolist()))


def _spacing(name: str, config: Mapping[str, Any], size: int) -> Spacing:
    spacing = config.get("timestep_spacing", "linspace" if name in LINSPACE else "leading")
    if spacing == "trailing":
        return Even()
    if spacing == "linspace":
        return (
            Linspace(last=1 / size)
            if name.startswith("Euler")
            else RoundedLinspace(table_size=size)
        )
    stops_at_first = name in ("DDIMScheduler", "PNDMScheduler") and not config.get(
        "set_alpha_to_one", name == "DDIMScheduler"
    )
    return Leading(
        table_size=size,
        offset=int(config.get("steps_offset", 0)),
        end="first" if stops_at_first else "clean",
    )
