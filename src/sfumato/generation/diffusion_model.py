"""The learned model, its use as a denoiser, and the settings of sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from sfumato.conditioners import CompositeConditioner
from sfumato.config import with_shorthands
from sfumato.config.bounds import Count, Finite, Limit
from sfumato.diffusion import (
    Angle,
    Flow,
    GuidanceRescale,
    InputScaleConfig,
    Linear,
    NetworkDenoiser,
    NoiseInputConfig,
    ParameterizationConfig,
    Schedule,
    UnitVariance,
    require_schedule,
)
from sfumato.errors import ConfigError
from sfumato.networks import Backbone
from sfumato.sampling import (
    SAMPLERS,
    DPMSolverPP2M,
    Even,
    SamplerConfig,
    Spacing,
)


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """How the network's output and inputs are read.

    Attributes:
        parameterization: what it predicts.
        input_scale: factor on the noisy image; by default its own standard deviation is divided
            out.
        noise_input: how it is told the noise level.
    """

    parameterization: ParameterizationConfig = Flow()
    input_scale: InputScaleConfig = UnitVariance(0.5)
    noise_input: NoiseInputConfig = Angle()


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How images are made unless the call says otherwise.

    Attributes:
        sampler: the solver.
        schedule: where its grid of levels comes from; need not be the one trained on.
        steps: denoising steps.
        spacing: where on the schedule the levels of the grid lie.
        guidance: classifier-free guidance scale; 1 is off.
        interval: log-SNR from where to where guidance acts; outside, the condition alone does.
        guidance_rescale: what is done to guided predictions, which are larger than others; none by
            default.
        clip: whether each guess of the clean image is clamped to [-1, 1], as DDPM does; for models
            of pixels.
    """

    sampler: SamplerConfig = with_shorthands(DPMSolverPP2M(), SAMPLERS)
    schedule: Schedule = Linear()
    steps: Count = 25
    spacing: Spacing = Even()
    guidance: Finite = 1.0
    interval: tuple[Limit, Limit] = (-math.inf, math.inf)
    guidance_rescale: GuidanceRescale | None = None
    clip: bool = False

    def __post_init__(self) -> None:
        if (
            self.steps < 1
            or not math.isfinite(self.guidance)
            or not self.interval[0] < self.interval[1]
        ):
            raise ConfigError(
                f"steps = {self.steps}, guidance = {self.guidance}, interval = {self.interval}",
                where="sampling",
                hint="at least 1 step, a finite guidance (1 is off), and an interval from low to "
                "high log-SNR",
            )
        require_schedule(self.schedule, where="sampling.schedule")


class Model(nn.Module):
    """All that is learned: the network and its conditioner, used as a denoiser.

    Attributes:
        auxiliary: modules that are trained beside them and are of no use afterwards; empty in a
            model that was loaded.
    """

    network: Backbone
    conditioner: CompositeConditioner

    def __init__(
        self,
        network: Backbone,
        conditioner: CompositeConditioner,
        config: DenoiserConfig,
        auxiliary: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.network, self.conditioner, self.config = network, conditioner, config
        self.auxiliary = auxiliary or nn.Module()

    def denoiser(self, compute_dtype: torch.dtype = torch.float32) -> NetworkDenoiser:
        """Return the network as a denoiser; the network computes in `compute_dtype`."""
        return NetworkDenoiser(
            network=self.network,
            parameterization=self.config.parameterization,
            input_scale=self.config.input_scale,
            noise_input=self.config.noise_input,
            compute_dtype=compute_dtype,
        )
