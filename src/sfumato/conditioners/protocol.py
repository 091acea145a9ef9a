"""The interface of conditioners."""

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
        """Return the condition of a batch; where `context` lacks its entry, this is `null`."""

    @abstractmethod
    def null(self, batch_size: int) -> Condition:
        """Return the condition of a batch of which nothing is known."""

    def derive(
        self, images: Tensor, context: Mapping[str, Any], *, seed: int, first: int
    ) -> dict[str, Any]:
        """Return what training sees beyond the data, made from the images (B, C, H, W).

        Draws are keyed by the samples' numbers, `first` and following.
        """
        return {}

    def varied(self, context: Mapping[str, Any], draws: Tensor) -> Mapping[str, Any]:
        """Return the context as training varies it.

        Args:
            draws: (B,), uniform from `dropout` to 1 where the context is not hidden.
        """
        return context
