"""The training loop and what it keeps: optimizer, averaged weights, precision, validation, checkpoints.

It is handed a model, an objective and data, and knows no recipe.
"""

from sfumato.training.config import (
    Budget,
    CheckpointConfig,
    LogConfig,
    PreviewConfig,
    TrainingConfig,
    ValidationConfig,
)
from sfumato.training.diffusion import Diffusion
from sfumato.training.ema import FixedEMA, PowerEMA
from sfumato.training.encoding import with_latents
from sfumato.training.optimizers import AdamWConfig, MuonConfig
from sfumato.training.reconstruction import AdversarialConfig, LossesConfig, Reconstruction, Reconstructor, reconstructed
from sfumato.training.trainer import Trainer

__all__ = [
    "AdamWConfig", "AdversarialConfig", "Budget", "CheckpointConfig", "Diffusion", "FixedEMA", "LogConfig", "LossesConfig",
    "MuonConfig", "PowerEMA", "PreviewConfig", "Reconstruction", "Reconstructor", "Trainer", "TrainingConfig", "ValidationConfig",
    "reconstructed", "with_latents",
]  # fmt: skip
