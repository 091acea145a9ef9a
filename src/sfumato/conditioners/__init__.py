"""What steers a model: each conditioner turns the named context of a batch into a `Condition`, and
knows the condition for "nothing".
"""

from __future__ import annotations

from sfumato.conditioners.attributes import AttributesConditioner, AttributesConfig
from sfumato.conditioners.augmentation import AugmentationConditioner
from sfumato.conditioners.category import (
    CategoryConditioner,
    CategoryConfig,
    ClassLabelsConditioner,
    ClassLabelsConfig,
)
from sfumato.conditioners.composite import CompositeConditioner
from sfumato.conditioners.conditioning_info import ConditioningInfo
from sfumato.conditioners.doodle import DoodleConditioner, DoodleConfig
from sfumato.conditioners.image import (
    Downsample,
    Grayscale,
    Holes,
    ImageConditioner,
    ImageConfig,
    ReferenceConditioner,
    ReferenceConfig,
)
from sfumato.conditioners.learned_text import LearnedTextConditioner, LearnedTextConfig
from sfumato.conditioners.pipeline_text import PipelineTextConditioner, PipelineTextConfig
from sfumato.conditioners.points import PointsConditioner, PointsConfig, SplatConfig
from sfumato.conditioners.pretrained_text import (
    PretrainedTextConditioner,
    PretrainedTextConfig,
    TextEncoder,
)
from sfumato.conditioners.protocol import Conditioner
from sfumato.conditioners.resizing import ResizingConditioner, ResizingConfig
from sfumato.conditioners.tokenizer import WordTokenizer

__all__ = [
    "AttributesConditioner",
    "AttributesConfig",
    "AugmentationConditioner",
    "CategoryConditioner",
    "CategoryConfig",
    "ClassLabelsConditioner",
    "ClassLabelsConfig",
    "CompositeConditioner",
    "Conditioner",
    "ConditioningInfo",
    "DoodleConditioner",
    "DoodleConfig",
    "Downsample",
    "Grayscale",
    "Holes",
    "ImageConditioner",
    "ImageConfig",
    "LearnedTextConditioner",
    "LearnedTextConfig",
    "PipelineTextConditioner",
    "PipelineTextConfig",
    "PointsConditioner",
    "PointsConfig",
    "PretrainedTextConditioner",
    "PretrainedTextConfig",
    "ReferenceConditioner",
    "ReferenceConfig",
    "ResizingConditioner",
    "ResizingConfig",
    "SplatConfig",
    "TextEncoder",
    "WordTokenizer",
]  # fmt: skip
