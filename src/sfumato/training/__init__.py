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
from sfumato.training.ema import FixedEMA, PowerEMA
from sfumato.training.optimizers import AdamWConfig, MuonConfig
from sfumato.training.trainer import Trainer

__all__ = [
    "AdamWConfig", "Budget", "CheckpointConfig", "FixedEMA", "LogConfig", "MuonConfig", "PowerEMA", "PreviewConfig",
    "Trainer", "TrainingConfig", "ValidationConfig",
]  # fmt: skip
