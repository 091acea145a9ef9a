"""Adapters: small trainable parts inside a frozen model."""

from sfumato.adapters.adapter import (
    AdaptableConditioner,
    Adapter,
    Addition,
    BaseOf,
    ChangedLayer,
    WholeNetwork,
    changed_layers,
    freeze_base,
    without_adapters,
    without_added,
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
from sfumato.adapters.peft_adapters import (
    PeftLayer,
    bare,
    load_into_peft,
    opened_by_peft,
    peft_layers,
    peft_tensors,
    remove_peft,
)
from sfumato.adapters.peft_kinds import OFT, DoRA, LoKr, PeftAdapter
from sfumato.adapters.textual_inversion import LearnedTokens, TextualInversion, TokenLearner

__all__ = [
    "OFT",
    "AdaptableConditioner",
    "Adapter",
    "Addition",
    "BaseOf",
    "ChangedLayer",
    "Control",
    "ControlLoRA",
    "ControlNet",
    "Controlled",
    "DoRA",
    "Factors",
    "LearnedTokens",
    "LoKr",
    "LoRA",
    "PeftAdapter",
    "PeftLayer",
    "TextualInversion",
    "TokenLearner",
    "WholeNetwork",
    "Widened",
    "adaptable_layers",
    "adapted_layers",
    "add_product",
    "added_parameters",
    "bare",
    "changed_layers",
    "freeze_base",
    "load_into_peft",
    "opened_by_peft",
    "peft_layers",
    "peft_tensors",
    "remove_peft",
    "sharing_tensors",
    "without_adapters",
    "without_added",
]
