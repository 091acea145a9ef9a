"""Solvers of the sampling ODE and SDE, and the loop that drives them.

A sampler sees a denoiser and levels, never a network, a schedule or a guidance scale.
"""

from sfumato.sampling.churn import Churn, PlainSamplerConfig
from sfumato.sampling.ddim import DDIM
from sfumato.sampling.dpm_solver import DPMSolverPP2M
from sfumato.sampling.loop import StepInfo, count_evaluations, grid, sample
from sfumato.sampling.multistep import Multistep
from sfumato.sampling.noise import InterpolatedNoise, KeyedNoise
from sfumato.sampling.protocol import Denoise, History, Noise, Point, Sampler
from sfumato.sampling.registry import (
    INPAINTING_SAMPLER,
    REPAINT_SAMPLER,
    SAMPLERS,
    SamplerConfig,
    chosen_sampler,
    repeated,
    sampler_name,
)
from sfumato.sampling.repaint import RePaint
from sfumato.sampling.runge_kutta import TABLEAUS, RungeKutta, Tableau
from sfumato.sampling.spacing import (
    BetweenEnds,
    Even,
    Leading,
    Linspace,
    RoundedLinspace,
    Spacing,
    Terminal,
    Trailing,
)
from sfumato.sampling.unipc import UniPC

__all__ = [
    "DDIM",
    "INPAINTING_SAMPLER",
    "REPAINT_SAMPLER",
    "SAMPLERS",
    "TABLEAUS",
    "BetweenEnds",
    "Churn",
    "DPMSolverPP2M",
    "Denoise",
    "Even",
    "History",
    "InterpolatedNoise",
    "KeyedNoise",
    "Leading",
    "Linspace",
    "Multistep",
    "Noise",
    "PlainSamplerConfig",
    "Point",
    "RePaint",
    "RoundedLinspace",
    "RungeKutta",
    "Sampler",
    "SamplerConfig",
    "Spacing",
    "StepInfo",
    "Tableau",
    "Terminal",
    "Trailing",
    "UniPC",
    "chosen_sampler",
    "count_evaluations",
    "grid",
    "repeated",
    "sample",
    "sampler_name",
]  # fmt: skip
