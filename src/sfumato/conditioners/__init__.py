"""What steers a model: each conditioner turns a batch's named context into a `Condition`, and knows the condition for "nothing"."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from sfumato.condition import Condition, Context, ContextSizes
from sfumato.conditioners.attributes import AttributesConditioner, AttributesConfig
from sfumato.conditioners.augmentation import AugmentationConditioner
from sfumato.conditioners.category import CategoryConditioner, CategoryConfig
from sfumato.conditioners.composite import ConditionerModule, Joint
from sfumato.conditioners.config import ContextConfig, Facts
from sfumato.conditioners.doodle import DoodleConditioner, DoodleConfig
from sfumato.conditioners.image import (
    Grayscale,
    Holes,
    ImageConditioner,
    ImageConfig,
    ReferenceConditioner,
    ReferenceConfig,
    Shrink,
)
from sfumato.conditioners.learned_text import WordsConditioner, WordsConfig
from sfumato.conditioners.points import PointsConditioner, PointsConfig, SplatConfig
from sfumato.conditioners.pretrained_text import PretrainedTextConditioner, PretrainedTextConfig, TextEncoder
from sfumato.conditioners.tokenizer import Words


class Conditioner(Protocol):
    """Has `sizes` of the slots it fills and the share `dropout` of samples that training sends to `null`."""

    sizes: ContextSizes
    dropout: float

    def __call__(self, context: Context, batch_size: int) -> Condition: ...

    def null(self, batch_size: int) -> Condition: ...

    def derive(self, images: Tensor, context: Context, *, seed: int, first: int) -> dict[str, Any]:
        """What training is told that the data do not hold, made from the pictures; keyed by the samples' numbers."""
        ...


__all__ = [
    "AttributesConditioner", "AttributesConfig", "AugmentationConditioner", "CategoryConditioner", "CategoryConfig", "Conditioner",
    "ConditionerModule", "ContextConfig", "DoodleConditioner", "DoodleConfig", "Facts", "Grayscale", "Holes", "ImageConditioner",
    "ImageConfig", "Joint", "PointsConditioner", "PointsConfig", "PretrainedTextConditioner", "PretrainedTextConfig",
    "ReferenceConditioner", "ReferenceConfig", "Shrink", "SplatConfig", "TextEncoder", "Words", "WordsConditioner", "WordsConfig",
]  # fmt: skip
