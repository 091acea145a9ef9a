"""The interface of conditioners."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sfumato.condition import Condition, ContextSizes


class Conditioner(nn.Module, ABC):
    """Turns the values of a batch, by the name of the context, into a `Condition`.

    Attributes:
        sizes: of the slots that it fills.
        dropout: fraction of training samples that get `null` instead.
        is_user_input: whether a request may set it; if not, it only describes what was done to
            training images.
        guided: whether guidance leads away from its absence; if not, it is in all predictions.
    """

    sizes: ContextSizes
    dropout: float
    is_user_input: bool = True
    guided: bool = True

    @abstractmethod
    def forward(self, context: Mapping[str, Any], batch_size: int) -> Condition:
        """Return the condition of a batch; where `context` lacks its entry, this is `null`."""

    @abstractmethod
    def null(self, batch_size: int) -> Condition:
        """Return the unconditional condition of a batch."""

    def training_context(
        self, images: Tensor, context: Mapping[str, Any], *, seed: int, first: int
    ) -> dict[str, Any]:
        """Return the values that training derives from the images (B, C, H, W) or changes.

        Draws are keyed by the samples' numbers, `first` and following.
        """
        return {}

    def augmented(self, context: Mapping[str, Any], draws: Tensor) -> Mapping[str, Any]:
        """Return the context as training augments it.

        Args:
            draws: (B,), uniform from `dropout` to 1 where the context is not hidden.
        """
        return context

    def base_parts(self) -> dict[str, str]:
        """Return a hash of each pretrained part that its weights do not hold, by name."""
        return {}

    def encode_ahead(self, texts: Sequence[str]) -> None:
        """Encode texts that will be needed by a frozen encoder, and keep their embeddings where
        other processes of this machine find them.
        """

    def release_encoders(self) -> int:
        """Free frozen encoders; they are loaded again for texts that are not encoded yet.

        Returns:
            The number of parameters that were freed.
        """
        return 0

    def text_encoders(self) -> Mapping[str, nn.Module]:
        """Return the encoders whose layers a LoRA can change, by name; they are child modules only
        after `include_text_encoders`.

        Names are those of a pipeline of diffusers: text_encoder, text_encoder_2, ...
        """
        return {}

    def include_text_encoders(self) -> None:
        """Make the text encoders child modules, so that changes of their layers are trained."""
        return

    def text_layers(self) -> Mapping[str, nn.Module]:
        """Return the layers of text encoders that can be trained, by the encoder's name and their
        own; {} if there are none.
        """
        return {}

    def trained_text_encoders(self) -> Mapping[str, nn.Module]:
        """Return the text encoders that are child modules, by name."""
        return {}

    def replace_text_encoders(self, encoders: Mapping[str, nn.Module]) -> None:
        """Use other encoders in the place of some of `text_encoders`."""
        return
