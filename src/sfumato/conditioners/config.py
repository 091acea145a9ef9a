"""Which contexts steer a model, and the conditioner that is built for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

from sfumato.conditioners.attributes import AttributesConditioner, AttributesConfig
from sfumato.conditioners.augmentation import AugmentationConditioner
from sfumato.conditioners.category import CategoryConditioner, CategoryConfig
from sfumato.conditioners.composite import ConditionerModule, Joint
from sfumato.conditioners.doodle import DoodleConditioner, DoodleConfig
from sfumato.conditioners.image import ImageConditioner, ImageConfig, ReferenceConditioner, ReferenceConfig
from sfumato.conditioners.learned_text import WordsConfig
from sfumato.conditioners.points import PointsConditioner, PointsConfig
from sfumato.conditioners.pretrained_text import PretrainedTextConfig, TextEncoder
from sfumato.config.bounds import AnyFloat
from sfumato.errors import ConfigError

TextConfig = WordsConfig | PretrainedTextConfig


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What conditioners must know of the training set; kept in checkpoints.

    Attributes:
        channels: of pictures.
        categories: their names, in the order of their numbers.
        words: that captions use, for a tokenizer fitted to them.
        attributes, means, deviations: name, mean and standard deviation of each.
        dimensions: of points, features included; 0 where there are none.
        augmentation: numbers that tell what was done to a picture.
        factor: side of a picture over the side of what the network sees of it.
        bits: of each value in an image, 8 or 16.
        value_range: values of the source that 0 and 1 of an image stand for, [low, high]; None where they are those of its integers.
        alpha: what the last of 2 or 4 channels is: "none" (a channel like the others), "straight" alpha, or "premultiplied" alpha.
        untrained: those of `categories` that no training image has, since all of their images are held out.
    """

    channels: int
    categories: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    means: tuple[AnyFloat, ...] = ()
    deviations: tuple[AnyFloat, ...] = ()
    dimensions: int = 0
    augmentation: int = 0
    factor: int = 1
    bits: Literal[8, 16] = 8
    value_range: tuple[float, float] | None = None
    alpha: Literal["none", "straight", "premultiplied"] = "straight"
    untrained: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """What steers the model; each None where it does not, and all of them for an unconditional model.

    Attributes:
        category: which of the set's categories.
        attributes: numbers, and labels of which several hold at once.
        text: captions.
        image: a picture that has lost something (super-resolution, colourization, inpainting).
        reference: a picture to make variations of.
        doodle: a line drawing.
        points: a point cloud.
    """

    category: CategoryConfig | None = None
    attributes: AttributesConfig | None = None
    text: TextConfig | None = None
    image: ImageConfig | None = None
    reference: ReferenceConfig | None = None
    doodle: DoodleConfig | None = None
    points: PointsConfig | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        """The names of the contexts."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) is not None)

    @property
    def makes(self) -> bool:
        """Whether something is made from the training pictures themselves, so that latents alone do not do."""
        return not (self.doodle is None and self.image is None and self.reference is None)

    def build(self, facts: Facts, *, encoder: Callable[[PretrainedTextConfig], TextEncoder]) -> Joint:
        """The untrained conditioner for a training set.

        Args:
            encoder: where a pretrained text encoder comes from.
        Raises:
            ConfigError: if the set lacks what the configuration asks for.
        """
        parts: dict[str, ConditionerModule] = {}
        if self.category is not None:
            _require(facts.categories, "category", "categories", "sort the pictures into one sub-folder for each category")
            parts["category"] = CategoryConditioner(self.category, categories=len(facts.categories))
        if self.attributes is not None:
            _require(facts.attributes, "attributes", "attributes", "give them in metadata, as `attributes`")
            parts["attributes"] = AttributesConditioner(
                self.attributes, names=facts.attributes, mean=facts.means, deviation=facts.deviations
            )
        if self.text is not None:
            _require(facts.words, "text", "captions", "put a .txt beside each picture")
            parts["text"] = self.text.build(facts.words, encoder)
        if self.image is not None:
            parts["image"] = ImageConditioner(self.image, channels=facts.channels)
        if self.reference is not None:
            parts["reference"] = ReferenceConditioner(self.reference, channels=facts.channels)
        if self.doodle is not None:
            parts["doodle"] = DoodleConditioner(self.doodle)
        if self.points is not None:
            _require(facts.dimensions, "points", "point clouds", "put a .npy, .ply, .xyz or .csv beside each picture")
            parts["points"] = PointsConditioner(self.points, dimensions=facts.dimensions)
        if facts.augmentation:
            parts["augmentation"] = AugmentationConditioner(labels=facts.augmentation)
        return Joint(parts, factor=facts.factor)


def _require(found: object, name: str, what: str, hint: str) -> None:
    if not found:
        raise ConfigError(
            f"asks for {what}, and the data have none",
            where=f"conditioner.{name}",
            hint=f"set conditioner.{name}=null, or {hint}",
        )
