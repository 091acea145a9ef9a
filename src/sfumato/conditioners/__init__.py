"""What steers a model: each conditioner turns a batch's named context into a `Condition`, and knows the condition for "nothing"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from sfumato.condition import NO_CONDITION, NO_CONTEXT, Condition, ContextSizes
from sfumato.conditioners.category import CategoryConditioner, CategoryConfig


class Conditioner(Protocol):
    """Has `sizes` of the slots it fills and the share `dropout` of samples that training sends to `null`."""

    sizes: ContextSizes
    dropout: float

    def __call__(self, context: Mapping[str, Tensor]) -> Condition: ...

    def null(self, batch_size: int) -> Condition: ...


class Unconditional(nn.Module):
    """Fills no slot."""

    sizes, dropout = NO_CONTEXT, 0.0

    def forward(self, context: Mapping[str, Tensor]) -> Condition:
        return NO_CONDITION

    def null(self, batch_size: int) -> Condition:
        return NO_CONDITION


ConditionerModule = CategoryConditioner | Unconditional

__all__ = ["CategoryConditioner", "CategoryConfig", "Conditioner", "ConditionerModule", "Unconditional"]
