"""Adapters: small trainable parts inside a frozen network."""

from sfumato.adapters.adapter import Adapter, WholeNetwork
from sfumato.adapters.lora import LoRA, adapted_layers, without_adapters

__all__ = ["Adapter", "LoRA", "WholeNetwork", "adapted_layers", "without_adapters"]
