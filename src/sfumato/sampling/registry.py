"""Samplers by name, and the choice of the one to use."""

from __future__ import annotations

from sfumato.config import kind_of
from sfumato.errors import ConfigError, closest
from sfumato.sampling.churn import Churn
from sfumato.sampling.ddim import DDIM
from sfumato.sampling.dpm_solver import DPMSolverPP2M
from sfumato.sampling.multistep import Multistep
from sfumato.sampling.repaint import RePaint
from sfumato.sampling.runge_kutta import RungeKutta
from sfumato.sampling.unipc import UniPC

SamplerConfig = DDIM | RungeKutta | Multistep | DPMSolverPP2M | UniPC | Churn

# Names for the command line and `Pipeline.sample`.
SAMPLERS: dict[str, SamplerConfig] = {
    "ddim": DDIM(),
    "ddpm": DDIM(eta=1.0),
    "euler": RungeKutta("euler"),
    "midpoint": RungeKutta("midpoint"),
    "heun": RungeKutta("heun"),
    "rk4": RungeKutta("rk4"),
    "multistep2": Multistep(2),
    "multistep3": Multistep(3),
    "multistep4": Multistep(4),
    "dpm-solver++2m": DPMSolverPP2M(),
    "dpm-solver++2m-sde": DPMSolverPP2M(eta=1.0),
    "unipc": UniPC(),
    "churn": Churn(RungeKutta("heun")),
}

# Where a part of the image is kept and no sampler is named: see docs/sampling.md for their bias.
INPAINTING_SAMPLER, REPAINT_SAMPLER = "churn", "ddpm"


def chosen_sampler(
    sampler: str | SamplerConfig | None,
    default: SamplerConfig,
    *,
    inpainting: bool = False,
    resample: int = 1,
) -> SamplerConfig:
    """Return the requested sampler, or one that suits the task.

    Args:
        sampler: a sampler or its name; None for `default`, or where a part of each image is kept,
            for one that brings the rest in line with it.
        default: used where none is requested and nothing is kept.
        inpainting: whether a part of each image is kept.
        resample: how many times each step is taken (RePaint).
    Raises:
        ConfigError: for an unknown name, naming the nearest.
    """
    if isinstance(sampler, str):
        return find_sampler(sampler)
    if sampler is None and inpainting:
        return SAMPLERS[INPAINTING_SAMPLER if resample == 1 else REPAINT_SAMPLER]
    return sampler or default


def repeated(sampler: SamplerConfig, *, inpainting: bool, resample: int) -> SamplerConfig | RePaint:
    """Return a sampler that takes each step `resample` times.

    Raises:
        ConfigError: if nothing is kept of the images, or the sampler cannot repeat its steps.
    """
    if resample != 1 and not inpainting:
        raise ConfigError(
            "resample needs an image and a mask, and nothing is kept of the images here",
            where="sample",
            hint="give an image and a mask, or leave it out",
        )
    return sampler if resample == 1 else RePaint(sampler, times=resample)  # type: ignore[arg-type]


def find_sampler(name: str) -> SamplerConfig:
    """Return the sampler of that name.

    Raises:
        ConfigError: if there is none, naming the nearest.
    """
    if name in SAMPLERS:
        return SAMPLERS[name]
    raise ConfigError(
        f"unknown sampler {name!r}",
        where="sample",
        hint=f"{closest(name, SAMPLERS)}there are {', '.join(SAMPLERS)}",
    )


def sampler_name(sampler: SamplerConfig) -> str:
    """Return the name under which a sampler is requested; that of its kind where it has none."""
    named = (name for name, known in SAMPLERS.items() if known == sampler)
    return next(named, kind_of(type(sampler)))
