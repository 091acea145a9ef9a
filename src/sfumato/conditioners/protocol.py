"""What a conditioner is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sfumato.condition import Condition, ContextSizes


class Conditioner(nn.Module, ABC):
    """Turns what is known of each image of a batch, by name, into a `Condition`.

    Attributes:
        sizes: of the slots that it fills.
        dropout: fraction of training samples that see `null` instead.
        steers: whether a request may ask for it; if not, it only describes what was done to
            training images.
    """

    sizes: ContextSizes
    dropout: float
    steers: bool = True

    @abstractmethod
    def forward(self, context: Mapping[str, Any], batch_size: int) -> Condition:
        """The condition of a batch; what `context` lacks asks for nothing."""

    @abstractmethod
    def null(self, batch_size: int) -> Condition:
        """The condition that asks for nothing."""

    def derive(
        self, images: Tensor, context: Mapping[str, Any], *, seed: int, first: int
    ) -> dict[str, Any]:
        """What training is given beyond the data, made from the images (B, C, H, W) themselves;
        keyed by the samples' numbers.
        """
        return {}

    def varied(self, context: Mapping[str, Any], draws: Tensor) -> Mapping[str, Any]:
        """The context as training varies it.

        Args:
            draws: (B,), uniform from `dropout` to 1 where the context is not hidden.
        """
        return context
