"""Categories: a learned vector for each, and one more for "none"; or numbers, for networks that learn
their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sfumato.adapters import Addition
from sfumato.condition import Condition, ContextSizes
from sfumato.conditioners.protocol import Conditioner
from sfumato.config.bounds import Fraction, Size
from sfumato.errors import ConfigError, closest


@dataclass(frozen=True, kw_only=True)
class CategoryConfig:
    """Steer by the image's category.

    Attributes:
        size: of the learned vectors.
        dropout: share of training samples whose category is replaced by "none", which is what
            guidance extrapolates from.
    """

    kind: ClassVar[str] = "learned"

    size: Size = 128
    dropout: Fraction = 0.1

    def build(self, categories: Sequence[str], *, added: int = 0) -> CategoryConditioner:
        """Build the untrained vectors.

        Args:
            added: number of categories that the model's base does not know, the last ones.
        """
        return CategoryConditioner(self, categories=len(categories), added=added)


class CategoryConditioner(Conditioner):
    """context["category"] (B,) -> Condition.vector (B, size).

    Index -1, or no category at all, gives the null vector.
    """

    def __init__(self, config: CategoryConfig, *, categories: int, added: int = 0) -> None:
        """Build the table.

        Args:
            added: number of categories that the model's base does not know, the last ones.
        """
        super().__init__()
        self.dropout = config.dropout
        self.sizes = ContextSizes(vector=config.size)
        self.embedding = nn.Embedding(categories - added + 1, config.size)
        self.added = AddedRows(added, config.size) if added else None

    def forward(self, context: Mapping[str, Any], batch_size: int) -> Condition:
        """Look up each category's learned vector; without a context, return `null`."""
        if "category" not in context:
            return self.null(batch_size)
        category, null = context["category"].to(self._device), self.embedding.num_embeddings - 1
        if self.added is None:
            return Condition(vector=self.embedding(torch.where(category < 0, null, category)))
        known = (category >= 0) & (category < null)
        vector = self.embedding(torch.where(known, category, null))
        return Condition(vector=vector + self.added(category - null))

    def null(self, batch_size: int) -> Condition:
        """Return the learned vector for "none"."""
        none = torch.full((batch_size,), self.embedding.num_embeddings - 1, device=self._device)
        return Condition(vector=self.embedding(none))

    @property
    def _device(self) -> torch.device:
        return self.embedding.weight.device


class AddedRows(Addition):
    """Vectors of categories that the base does not know: what is added to the vector for "none",
    zero at first.
    """

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(count, size))

    def forward(self, number: Tensor) -> Tensor:
        """Return the row of each number (B,), and zero for negative ones, (B, size)."""
        if not self.adapted:
            return self.rows.new_zeros(len(number), self.rows.shape[1])
        rows: Tensor = self.rows[number.clamp(min=0)]
        return rows * (number >= 0)[:, None]


@dataclass(frozen=True, kw_only=True)
class ClassLabelsConfig:
    """Steer by the image's category as the number of a class, which the network itself embeds: DiT
    of diffusers.

    Attributes:
        names: of the network's classes, in the order of their numbers; the number after the last
            one stands for "none".
        dropout: share of training samples whose category is replaced by "none".
    """

    kind: ClassVar[str] = "class-labels"

    names: tuple[str, ...]
    dropout: Fraction = 0.1

    def build(self, categories: Sequence[str], *, added: int = 0) -> ClassLabelsConditioner:
        """Build the conditioner; nothing in it is trained, and no class can be added.

        Raises:
            ConfigError: for a category that is not the name of a class.
        """
        for name in categories:
            if name not in self.names:
                raise ConfigError(
                    f"the network has no class {name!r}",
                    where="conditioner.category",
                    hint=f"{closest(name, self.names)}name the folders of images like its classes: "
                    f"{', '.join(self.names[:20])}, ...",
                )
        numbers = [self.names.index(name) for name in categories]
        return ClassLabelsConditioner(self, numbers=numbers)


class ClassLabelsConditioner(Conditioner):
    """context["category"] (B,) -> Condition.vector (B, 1), the number of a class.

    Index -1, or no category at all, gives the number of "none".
    """

    numbers: Tensor

    def __init__(self, config: ClassLabelsConfig, *, numbers: Sequence[int]) -> None:
        """Hold the number of the class of each category."""
        super().__init__()
        self.config, self.dropout = config, config.dropout
        self.sizes = ContextSizes(vector=1)
        self.register_buffer(
            "numbers", torch.tensor([*numbers, len(config.names)]).float(), persistent=False
        )

    def forward(self, context: Mapping[str, Any], batch_size: int) -> Condition:
        """Look up each category's number; without a context, return `null`."""
        if "category" not in context:
            return self.null(batch_size)
        return Condition(vector=self.numbers[context["category"].to(self.numbers.device)][:, None])

    def null(self, batch_size: int) -> Condition:
        """Return the number of "none"."""
        return Condition(vector=self.numbers[-1:].expand(batch_size, 1))
