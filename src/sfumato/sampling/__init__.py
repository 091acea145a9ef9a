"""Solvers of the sampling ODE and SDE, and the loop that drives them.

A sampler sees a denoiser and levels, never a network, a schedule or a guidance scale.
"""

from sfumato.sampling.churn import Churn, PlainSamplerConfig
from sfumato.sampling.ddim import DDIM
from sfumato.sampling.dpm_solver import DPMSolverPP2M
from sfumato.sampling.loop import StepInfo, grid, sample
from sfumato.sampling.multistep import Multistep
from sfumato.sampling.noise import InterpolatedNoise, KeyedNoise
from sfumato.sampling.protocol import Denoise, History, Noise, Point, Sampler
from sfumato.sampling.registry import FILLING, RESAMPLING, SAMPLERS, SamplerConfig, chosen_sampler
from sfumato.sampling.resampling import Resampled
from sfumato.sampling.runge_kutta import TABLEAUS, RungeKutta, Tableau
from sfumato.sampling.unipc import UniPC

__all__ = [
    "DDIM",
    "FILLING",
    "RESAMPLING",
    "SAMPLERS",
    "TABLEAUS",
    "Churn",
    "DPMSolverPP2M",
    "Denoise",
    "History",
    "InterpolatedNoise",
    "KeyedNoise",
    "Multistep",
    "Noise",
    "PlainSamplerConfig",
    "Point",
    "Resampled",
    "RungeKutta",
    "Sampler",
    "SamplerConfig",
    "StepInfo",
    "Tableau",
    "UniPC",
    "chosen_sampler",
    "grid",
    "sample",
]  # fmt: skip
