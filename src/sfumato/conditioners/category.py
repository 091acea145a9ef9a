"""Categories: a learned vector for each, and one more for "none"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sfumato.condition import Condition, ContextSizes
from sfumato.conditioners.protocol import Conditioner
from sfumato.config.bounds import Fraction, Size


@dataclass(frozen=True, kw_only=True)
class CategoryConfig:
    """Steer by the image's category.

    Attributes:
        size: of the learned vectors.
        dropout: share of training samples whose category is replaced by "none", which is what
            guidance extrapolates from.
    """

    size: Size = 128
    dropout: Fraction = 0.1


class CategoryConditioner(Conditioner):
    """context["category"] (B,) -> Condition.vector (B, size).

    Index -1, or no category at all, gives the null vector.
    """

    def __init__(self, config: CategoryConfig, *, categories: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.sizes = ContextSizes(vector=config.size)
        self.embedding = nn.Embedding(categories + 1, config.size)

    def forward(self, context: Mapping[str, Any], batch_size: int) -> Condition:
        """Look up each category's learned vector; without a context, return `null`."""
        if "category" not in context:
            return self.null(batch_size)
        category = context["category"].to(self.embedding.weight.device)
        null = self.embedding.num_embeddings - 1
        return Condition(vector=self.embedding(torch.where(category < 0, null, category)))

    def null(self, batch_size: int) -> Condition:
        """Return the learned vector for "none"."""
        none = torch.full(
            (batch_size,), self.embedding.num_embeddings - 1, device=self.embedding.weight.device
        )
        return Condition(vector=self.embedding(none))
