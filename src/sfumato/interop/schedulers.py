"""Scheduler configurations of diffusers as schedules, parameterizations, grids and samplers.

A scheduler class of diffusers is four things at once. Here each of its keys is either understood,
known to change nothing on the way, or refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sfumato.diffusion import (
    Epsilon,
    Flow,
    FlowTime,
    Linear,
    LinearBetas,
    ParameterizationConfig,
    ResolutionShift,
    Sample,
    ScaledLinear,
    Schedule,
    Shift,
    Span,
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
    BetweenEnds,
    DPMSolverPP2M,
    Even,
    Leading,
    Linspace,
    RoundedLinspace,
    SamplerConfig,
    Spacing,
    Terminal,
    Trailing,
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
# they may be used for flow matching; and with one of RULES, they visit the ends of the whole table
WHOLE_TABLE = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
RULED = (*WHOLE_TABLE, "EulerDiscreteScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler")
RULES: dict[str, Literal["karras", "exponential", "beta"]] = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
}
# spacings of the same name that have other levels in diffusers than here: (class, spacing)
OTHER_LEVELS = (
    ("DDPMScheduler", "linspace"),
    ("DDIMScheduler", "linspace"),
    ("DPMSolverMultistepScheduler", "leading"),
)
# keys that would change the path of the levels, and the values that do not
REFUSED: dict[str, tuple[Any, ...]] = {
    "use_lu_lambdas": (False, None),
    "thresholding": (False, None),
    "snr_shift_scale": (1.0, None),
    "invert_sigmas": (False, None),
    "stochastic_sampling": (False, None),
    "time_shift_type": ("exponential", None),
    "final_sigmas_type": ("zero", None),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "timestep_type": ("discrete", None),
    "interpolation_type": ("linear", None),
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


def read_scheduler(
    config: Mapping[str, Any],
    *,
    where: str,
    even_times: bool = False,
    unsupported: Collection[str] = (),
) -> ReadScheduler:
    """Read the configuration of a scheduler (scheduler_config.json).

    Args:
        even_times: whether the pipeline gives a flow-matching scheduler its times, from 1 to 1/n
            in n even steps; otherwise those are the scheduler's own.
        unsupported: further keys that must not be set.
    Raises:
        ConfigError: for a class or a key that is not supported.
    """
    name = str(config.get("_class_name", ""))
    for key, harmless in REFUSED.items():
        if key in config and config[key] not in harmless:
            raise _unsupported(key, config, where)
    for key in unsupported:
        if config.get(key):
            raise _unsupported(key, config, where)
    if name in FLOW:
        return _flow(config, even_times=even_times)
    if name not in SAMPLERS:
        raise ConfigError(
            f"unsupported scheduler class {name!r}",
            where=where,
            hint=f"supported are {', '.join([*SAMPLERS, *FLOW])}",
        )
    for key in ("use_dynamic_shifting", "shift_terminal", *RULES):
        if config.get(key) and not (key in RULES and name in RULED):
            raise _unsupported(key, config, where)
    if config.get("use_flow_sigmas"):
        return _flow_table(name, config, where)
    return _table(name, config, where)


def _unsupported(key: str, config: Mapping[str, Any], where: str) -> ConfigError:
    return ConfigError(
        f"{key} = {config[key]!r} is not supported",
        where=where,
        hint="set it to its default in scheduler_config.json, or use another scheduler",
    )


LINEAR_PATH = DenoiserConfig(parameterization=Flow(), input_scale=UnitSum(), noise_input=FlowTime())


def _flow(config: Mapping[str, Any], *, even_times: bool) -> ReadScheduler:
    """Read a flow-matching scheduler.

    Its own times are even from 1 to its smallest level, which is shifted already if the shift is
    constant, and is then shifted once more, as diffusers does.
    """
    size, shift = int(config.get("num_train_timesteps", 1000)), float(config.get("shift", 1.0))
    schedule: Schedule = Linear() if shift == 1 else Warped(schedule=Linear(), warp=Shift(shift))
    smallest = float(schedule(torch.tensor(1 / size, dtype=torch.float64)).sigma)
    if config.get("use_dynamic_shifting"):
        schedule, smallest = Warped(schedule=Linear(), warp=_resolution_shift(config)), 1 / size
    spacing: Spacing = Even() if even_times else Linspace(last=smallest)
    if config.get("shift_terminal"):
        spacing = Terminal(spacing=spacing, noise=float(config["shift_terminal"]))
    return ReadScheduler(
        schedule=schedule,
        denoiser=LINEAR_PATH,
        sampling=SamplingConfig(
            sampler=DDIM(), schedule=schedule, spacing=_ruled(config, spacing, Flow())
        ),
    )


def _resolution_shift(config: Mapping[str, Any]) -> ResolutionShift:
    return ResolutionShift(
        base_tokens=int(config.get("base_image_seq_len", 256)),
        max_tokens=int(config.get("max_image_seq_len", 4096)),
        base_mu=float(config.get("base_shift", 0.5)),
        max_mu=float(config.get("max_shift", 1.15)),
    )


def _ruled(
    config: Mapping[str, Any], spacing: Spacing, coordinate: ParameterizationConfig
) -> Spacing:
    """Return the spacing, or the one that a rule spreads between its ends."""
    rule = next((rule for key, rule in RULES.items() if config.get(key)), None)
    if rule is None:
        return spacing
    return BetweenEnds(spacing=spacing, rule=rule, coordinate=coordinate)


def _flow_table(name: str, config: Mapping[str, Any], where: str) -> ReadScheduler:
    """Read another scheduler's version for flow matching (`use_flow_sigmas`).

    Its times are even from 1 - 1/T to 0, and then shifted.
    """
    if name not in WHOLE_TABLE or any(config.get(key) for key in RULES):
        raise _unsupported("use_flow_sigmas", config, where)
    if config.get("prediction_type") != "flow_prediction":
        raise _unsupported("prediction_type", {"prediction_type": "epsilon", **config}, where)
    size = int(config.get("num_train_timesteps", 1000))
    schedule: Schedule = Warped(schedule=Linear(), warp=Shift(float(config.get("flow_shift", 1.0))))
    return ReadScheduler(
        schedule=schedule,
        denoiser=LINEAR_PATH,
        sampling=SamplingConfig(
            sampler=SAMPLERS[name],
            schedule=Warped(schedule=schedule, warp=Span(high=1 - 1 / size)),
        ),
        remarks=(*_replaced(name), ROUNDED),
    )


ROUNDED = (
    "the network is told the time of each level, which diffusers rounds to a whole number of "
    "timesteps"
)


def _replaced(name: str) -> list[str]:
    """Return a line about the sampler that is used in the place of a scheduler's own."""
    if name not in REPLACED:
        return []
    return [f"{name} is replaced by the sampler dpm-solver++2m on the same levels"]


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
    remarks = _replaced(name)
    ruled = any(config.get(key) for key in RULES)
    if ruled and name in WHOLE_TABLE:
        remarks.append(ROUNDED)
    if (name, _spacing_name(name, config)) in OTHER_LEVELS and not ruled:
        remarks.append(
            f"timestep_spacing={_spacing_name(name, config)} has other levels in diffusers' {name} "
            "than here, so that its images differ"
        )
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
            spacing=_ruled(
                config,
                Linspace(last=1 / size)
                if ruled and name in WHOLE_TABLE
                else _spacing(name, config, size),
                Epsilon(),
            ),
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


def _spacing_name(name: str, config: Mapping[str, Any]) -> str:
    return str(config.get("timestep_spacing", "linspace" if name in LINSPACE else "leading"))


def _spacing(name: str, config: Mapping[str, Any], size: int) -> Spacing:
    spacing = _spacing_name(name, config)
    if spacing == "trailing":
        return Trailing(table_size=size)
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
