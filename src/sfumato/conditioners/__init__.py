"""What steers a model: each conditioner turns a batch's named context into a `Condition`, and knows the condition for "nothing"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from sfumato.condition import Condition, ContextSizes
from sfumato.conditioners.augmentation import AugmentationConditioner
from sfumato.conditioners.category import CategoryConditioner, CategoryConfig
from sfumato.conditioners.joint import ConditionerModule, Joint


class Conditioner(Protocol):
    """Has `sizes` of the slots it fills and the share `dropout` of samples that training sends to `null`."""

    sizes: ContextSizes
    dropout: float

    def __call__(self, context: Mapping[str, Tensor], batch_size: int) -> Condition: ...

    def null(self, batch_size: int) -> Condition: ...


__all__ = ["AugmentationConditioner", "CategoryConditioner", "CategoryConfig", "Conditioner", "ConditionerModule", "Joint"]
