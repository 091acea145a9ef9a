"""Adapters: small trainable parts inside a frozen model."""

from sfumato.adapters.adapter import (
    Adapter,
    Addition,
    BaseOf,
    WholeNetwork,
    freeze_base,
    without_adapters,
)
from sfumato.adapters.lora import LoRA, adapted_layers

__all__ = [
    "Adapter",
    "Addition",
    "BaseOf",
    "LoRA",
    "WholeNetwork",
    "adapted_layers",
    "freeze_base",
    "without_adapters",
]
