"""Attributes: numbers and labels, several of which hold at once, each known or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfumato import randomness
from sfumato.condition import Condition, ContextSizes
from sfumato.conditioners.protocol import Conditioner
from sfumato.config.bounds import Fraction, Size


@dataclass(frozen=True, kw_only=True)
class AttributesConfig:
    """Steer by numbers that belong to the images, such as an age, or 1 and 0 for labels of which
    several may hold.

    Attributes:
        size: of the summary.
        dropout: share of training samples whose attributes are all hidden.
        hidden: share of single attributes that are also hidden one by one, so that any subset can
            be requested.
    """

    size: Size = 128
    dropout: Fraction = 0.1
    hidden: Fraction = 0.1


class AttributesConditioner(Conditioner):
    """context["attributes"] (B, D), NaN where unknown -> Condition.vector (B, size).

    An image of which nothing is known gets the null condition.

    Args:
        names: of the attributes.
        mean, deviation: of each in the training set, which are divided out.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        config: AttributesConfig,
        *,
        names: Sequence[str],
        mean: Sequence[float],
        deviation: Sequence[float],
    ) -> None:
        super().__init__()
        self.config, self.names, self.dropout = config, tuple(names), config.dropout
        self.sizes = ContextSizes(vector=config.size)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer(
            "deviation", torch.tensor([d if d > 1e-6 else 1.0 for d in deviation]), persistent=False
        )
        self.embedding = nn.Sequential(
            nn.Linear(2 * len(names), config.size), nn.SiLU(), nn.Linear(config.size, config.size)
        )

    def forward(self, context: Mapping[str, Any], batch_size: int) -> Condition:
        """Embed standardized values and which are known; without a context, return `null`."""
        if "attributes" not in context:
            return self.null(batch_size)
        values = (context["attributes"].to(self.mean) - self.mean) / self.deviation
        return Condition(
            vector=self.embedding(
                torch.cat([values.nan_to_num(0.0), (~values.isnan()).to(values.dtype)], dim=1)
            )
        )

    def null(self, batch_size: int) -> Condition:
        """Return the condition of images whose attributes are all unknown."""
        return Condition(
            vector=self.embedding(self.mean.new_zeros(batch_size, 2 * len(self.names)))
        )

    def training_context(
        self, images: Tensor, context: Mapping[str, Any], *, seed: int, first: int
    ) -> dict[str, Any]:
        """Hide some of the training attributes at random, keyed by the samples' numbers."""
        if "attributes" not in context:
            return {}
        values = context["attributes"]
        draws = randomness.uniform(
            seed, "attributes", first=first, count=len(values), per_item=values.shape[1]
        )
        return {
            "attributes": values.masked_fill(
                (draws < self.config.hidden).to(values.device), torch.nan
            )
        }
