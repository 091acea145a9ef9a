"""Adapters: small trainable parts inside a frozen model."""

from sfumato.adapters.adapter import (
    AdaptableConditioner,
    Adapter,
    Addition,
    BaseOf,
    WholeNetwork,
    freeze_base,
    without_adapters,
)
from sfumato.adapters.control_lora import (
    Controlled,
    ControlLoRA,
    Widened,
    added_parameters,
)
from sfumato.adapters.controlnet import Control, ControlNet
from sfumato.adapters.lora import (
    Factors,
    LoRA,
    adaptable_layers,
    adapted_layers,
    add_product,
    sharing_tensors,
)
from sfumato.adapters.textual_inversion import LearnedTokens, TextualInversion, TokenLearner

__all__ = [
    "AdaptableConditioner",
    "Adapter",
    "Addition",
    "BaseOf",
    "Control",
    "ControlLoRA",
    "ControlNet",
    "Controlled",
    "Factors",
    "LearnedTokens",
    "LoRA",
    "TextualInversion",
    "TokenLearner",
    "WholeNetwork",
    "Widened",
    "adaptable_layers",
    "adapted_layers",
    "add_product",
    "added_parameters",
    "freeze_base",
    "sharing_tensors",
    "without_adapters",
]
