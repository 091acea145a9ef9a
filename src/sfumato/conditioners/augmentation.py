"""The augmentation of a training image as a condition, so that it is not learned as part of the
data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sfumato.condition import Condition, ContextSizes
from sfumato.conditioners.protocol import Conditioner


class AugmentationConditioner(Conditioner):
    """context["augmentation"] (B, D) -> Condition.vector (B, D).

    Zeros, or a missing context, mean no augmentation.
    """

    nothing: Tensor
    is_user_input = False
    dropout = 0.0  # without its label, an augmentation would leak into the samples

    def __init__(self, *, labels: int) -> None:
        super().__init__()
        self.sizes = ContextSizes(vector=labels)
        self.register_buffer("nothing", torch.zeros(labels), persistent=False)

    def forward(self, context: Mapping[str, Any], batch_size: int) -> Condition:
        """Return the augmentation as the vector; zeros if none is given."""
        return Condition(vector=context.get("augmentation", self.nothing.expand(batch_size, -1)))

    def null(self, batch_size: int) -> Condition:
        """Return zeros: no augmentation."""
        return Condition(vector=self.nothing.expand(batch_size, -1))
