"""The training loop and its parts: optimizers, averages, precision, validation and checkpoints.

It receives a model, an objective and data, and does not depend on recipes.
"""

from sfumato.training.auxiliary import AlignmentConfig, AuxiliaryConfig, DispersiveConfig
from sfumato.training.config import (
    Budget,
    CheckpointConfig,
    LogConfig,
    PostHocEMAConfig,
    PreviewConfig,
    SweepConfig,
    TrainingConfig,
    ValidationConfig,
)
from sfumato.training.ema import FixedEMA, PowerEMA
from sfumato.training.latent_cache import encode_part, latents_kept, with_latents
from sfumato.training.optimizers import MuonConfig, OptimizerConfig
from sfumato.training.preservation import PreservationConfig
from sfumato.training.tasks.diffusion import Diffusion
from sfumato.training.tasks.reconstruction import (
    AdversarialConfig,
    LossesConfig,
    Reconstruction,
    Reconstructor,
    reconstruct,
)
from sfumato.training.trainer import Trainer

__all__ = [
    "AdversarialConfig",
    "AlignmentConfig",
    "AuxiliaryConfig",
    "Budget",
    "CheckpointConfig",
    "Diffusion",
    "DispersiveConfig",
    "FixedEMA",
    "LogConfig",
    "LossesConfig",
    "MuonConfig",
    "OptimizerConfig",
    "PostHocEMAConfig",
    "PowerEMA",
    "PreservationConfig",
    "PreviewConfig",
    "Reconstruction",
    "Reconstructor",
    "SweepConfig",
    "Trainer",
    "TrainingConfig",
    "ValidationConfig",
    "encode_part",
    "latents_kept",
    "reconstruct",
    "with_latents",
]
