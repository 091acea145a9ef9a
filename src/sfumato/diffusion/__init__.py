"""The mathematics of diffusion, free of networks: levels, schedules, parameterizations, denoisers, guidance, the loss.

Everything here is immutable, and knows tensors and `Condition` only. Networks, data and files may not enter.
"""

from sfumato.diffusion.coupling import Coupling, CouplingConfig, Independent, MinibatchOptimalTransport
from sfumato.diffusion.denoiser import (
    Angle,
    Denoiser,
    FlowTime,
    InputScaleConfig,
    LogSNR,
    Network,
    NetworkDenoiser,
    NoiseInputConfig,
    UnitSum,
    UnitVariance,
)
from sfumato.diffusion.exact import EmpiricalDenoiser
from sfumato.diffusion.guidance import AutoGuidance, ClassifierFree, Clip, Interval, Threshold
from sfumato.diffusion.level import Denoised, NoiseLevel
from sfumato.diffusion.objective import IndependentTimes, Losses, Objective, Stratified, Times, TimesConfig
from sfumato.diffusion.parameterizations import Epsilon, Flow, Parameterization, ParameterizationConfig, Sample, Velocity
from sfumato.diffusion.schedules import (
    Cosine,
    Geometric,
    Karras,
    Linear,
    LinearBetas,
    LogitNormal,
    LogNormal,
    Mode,
    ScaledLinear,
    Schedule,
    ScheduleConfig,
    Shift,
    Sigmoid,
    Span,
    Tabulated,
    UniformLogSNR,
    VarianceExploding,
    VariancePreserving,
    Warp,
    WarpConfig,
    Warped,
    ZeroTerminalSNR,
)
from sfumato.diffusion.weighting import (
    EDM,
    MinSNR,
    Native,
    SigmoidWeighting,
    UniformEpsilon,
    Weighting,
    WeightingConfig,
    target_weight,
)

__all__ = [
    "EDM", "Angle", "AutoGuidance", "ClassifierFree", "Clip", "Cosine", "Coupling", "CouplingConfig", "Denoised", "Denoiser", "EmpiricalDenoiser",
    "Epsilon", "Flow", "FlowTime", "Geometric", "Independent", "IndependentTimes", "InputScaleConfig", "Interval", "Karras",
    "Linear", "LinearBetas", "LogNormal", "LogSNR", "LogitNormal", "Losses", "MinSNR", "MinibatchOptimalTransport", "Mode",
    "Native", "Network", "NetworkDenoiser", "NoiseInputConfig", "NoiseLevel", "Objective", "Parameterization",
    "ParameterizationConfig", "Sample", "ScaledLinear", "Schedule", "ScheduleConfig", "Shift", "Sigmoid", "SigmoidWeighting",
    "Span", "Stratified", "Tabulated", "Threshold", "Times", "TimesConfig", "UniformEpsilon", "UniformLogSNR", "UnitSum",
    "UnitVariance", "VarianceExploding", "VariancePreserving", "Velocity", "Warp", "WarpConfig", "Warped", "Weighting",
    "WeightingConfig", "ZeroTerminalSNR", "target_weight",
]  # fmt: skip
