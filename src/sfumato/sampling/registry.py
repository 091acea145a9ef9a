"""Samplers by name, and the choice of the one to use."""

from __future__ import annotations

import difflib

from sfumato.errors import ConfigError
from sfumato.sampling.churn import Churn
from sfumato.sampling.ddim import DDIM
from sfumato.sampling.dpm_solver import DPMSolverPP2M
from sfumato.sampling.multistep import Multistep
from sfumato.sampling.resampling import Resampled
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

# where a hole is filled and no sampler is named: see docs/sampling.md for their bias
FILLING, RESAMPLING = "churn", "ddpm"


def chosen_sampler(
    sampler: str | SamplerConfig | None,
    usual: SamplerConfig,
    *,
    filling: bool = False,
    resample: int = 1,
) -> SamplerConfig | Resampled:
    """Return the requested sampler, or one that suits the task.

    If none is given, a hole is filled by one that brings the rest in line with what is known, and
    other images are made by the usual one.

    Args:
        usual: used where none is given and no hole is filled.
        filling: whether a part of each image is known.
        resample: how many times each step is taken.
    Raises:
        ConfigError: for an unknown name, naming the nearest, or resampling that cannot be done.
    """
    if resample != 1 and not filling:
        raise ConfigError(
            "resampling where no part of an image is kept",
            where="sample",
            hint="give an image and a mask, or leave it out",
        )
    if isinstance(sampler, str):
        chosen = find_sampler(sampler)
    elif sampler is None and filling:
        chosen = SAMPLERS[FILLING if resample == 1 else RESAMPLING]
    else:
        chosen = sampler or usual
    return chosen if resample == 1 else Resampled(chosen, times=resample)  # type: ignore[arg-type]


def find_sampler(name: str) -> SamplerConfig:
    """Return the sampler of that name.

    Raises:
        ConfigError: if there is none, naming the nearest.
    """
    if name in SAMPLERS:
        return SAMPLERS[name]
    close = difflib.get_close_matches(name, SAMPLERS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ConfigError(
        f"no sampler {name!r}", where="sample", hint=f"{hint}there are {', '.join(SAMPLERS)}"
    )
