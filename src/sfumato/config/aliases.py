"""Former names: kinds, keys and values as earlier versions wrote them, so that old files and habits
keep working.
"""

from __future__ import annotations

# Kinds were class names. Those that differ from today's kind by more than capitals and hyphens:
FORMER_KINDS = {
    "ByRuns": "by-runs",
    "ByScript": "by-script",
    "DPMSolverPP2M": "dpm-solver++2m",
    "DiTConfig": "dit",
    "FixedEMA": "exponential",
    "FlowTime": "flow-time",
    "HuggingFace": "huggingface",
    "IndependentTimes": "independent",
    "LinearBetas": "linear-betas",
    "LogNormal": "log-normal",
    "LogSNR": "log-snr",
    "LogitNormal": "logit-normal",
    "LossSpace": "target-space",
    "MinSNR": "min-snr",
    "MinibatchOptimalTransport": "minibatch-optimal-transport",
    "OwnAutoencoder": "trained",
    "PixelSpace": "pixels",
    "PowerEMA": "power",
    "PretrainedAutoencoder": "pretrained",
    "PretrainedTextConfig": "pretrained",
    "RungeKutta": "runge-kutta",
    "ScaledLinear": "scaled-linear",
    "Shrink": "downsample",
    "SigmoidWeighting": "sigmoid",
    "UNetConfig": "unet",
    "UniformEpsilon": "uniform-epsilon",
    "UniformLogSNR": "uniform-log-snr",
    "UnitSum": "unit-sum",
    "UnitVariance": "unit-variance",
    "VarianceExploding": "variance-exploding",
    "VariancePreserving": "variance-preserving",
    "WebDataset": "webdataset",
    "WordsConfig": "learned",
    "ZeroTerminalSNR": "zero-terminal-snr",
}

# Keys by the dataclass that has them: former -> present.
FORMER_KEYS: dict[str, dict[str, str]] = {
    "OptimizerConfig": {
        "base_width": "mup_base_width",
        "clip": "max_grad_norm",
        "decay": "schedule",
        "final": "final_fraction",
    },
    "AlignmentConfig": {"until": "stop_at"},
    "AugmentConfig": {"non_leaking": "karras"},
    "DiTConfig": {
        "channels": "hidden_size",
        "dropped": "token_drop",
        "head_channels": "head_dim",
        "hidden": "mlp_ratio",
        "layers": "depth",
        "patch": "patch_size",
        "recompute": "activation_checkpointing",
        "tokens_as": "token_conditioning",
        "vector_as": "vector_conditioning",
    },
    "DispersiveConfig": {"until": "stop_at"},
    "DoodleConfig": {"dropped": "missing_lines", "made": "synthetic"},
    "ImageConfig": {"lost": "degradation"},
    "Objective": {"contrast": "contrastive_weight"},
    "PointsConfig": {"fewest": "min_points"},
    "PretrainedAutoencoder": {"variants": "augmented_copies"},
    "Run": {"posthoc": "post_hoc_ema"},
    "TargetSpace": {"most": "max_weight", "of": "space"},
    "TrainedAutoencoder": {"posthoc": "post_hoc_ema", "variants": "augmented_copies"},
    "TrainingConfig": {"posthoc": "post_hoc_ema"},
}

# Values of keys by the dataclass that has the keys: former -> present.
FORMER_VALUES: dict[str, dict[str, dict[str, str]]] = {
    "PointsConfig": {"frame": {"own": "normalized", "picture": "image"}},
}


def current_kind(name: str) -> str:
    """Return the current kind for a kind as written: a former name, capitals or underscores."""
    return FORMER_KINDS.get(name, name.lower().replace("_", "-"))
