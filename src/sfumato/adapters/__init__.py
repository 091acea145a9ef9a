"""Adapters: small trainable parts inside a frozen model."""

from sfumato.adapters.adapter import (
    Adapter,
    Addition,
    BaseOf,
    WholeNetwork,
    freeze_base,
    without_adapters,
)
from sfumato.adapters.lora import (
    Factors,
    LoRA,
    adaptable_layers,
    adapted_layers,
    add_product,
    sharing_tensors,
)

__all__ = [
    "Adapter",
    "Addition",
    "BaseOf",
    "Factors",
    "LoRA",
    "WholeNetwork",
    "adaptable_layers",
    "adapted_layers",
    "add_product",
    "freeze_base",
    "sharing_tensors",
    "without_adapters",
]
