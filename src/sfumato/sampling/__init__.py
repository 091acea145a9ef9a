"""Solvers of the sampling ODE and SDE, and the loop that drives them.

A sampler sees a denoiser and levels, never a network, a schedule or a guidance scale.
"""

from sfumato.sampling.churn import Churn, PlainSamplerConfig
from sfumato.sampling.ddim import DDIM
from sfumato.sampling.dpm_solver import DPMSolverPP2M
from sfumato.sampling.driver import Progress, grid, sample
from sfumato.sampling.multistep import Multistep
from sfumato.sampling.noise import KeyedNoise
from sfumato.sampling.protocol import Denoise, History, Noise, Point, Sampler
from sfumato.sampling.runge_kutta import TABLEAUS, RungeKutta, Tableau
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

__all__ = [
    "DDIM", "SAMPLERS", "TABLEAUS", "Churn", "DPMSolverPP2M", "Denoise", "History", "KeyedNoise", "Multistep", "Noise",
    "PlainSamplerConfig", "Point", "Progress", "RungeKutta", "Sampler", "SamplerConfig", "Tableau", "UniPC", "grid", "sample",
]  # fmt: skip
