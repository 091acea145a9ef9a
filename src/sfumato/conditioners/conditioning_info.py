"""What conditioners must know about the training set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from sfumato.config.bounds import AnyFloat


@dataclass(frozen=True, kw_only=True)
class ConditioningInfo:
    """What conditioners must know about the training set; stored in checkpoints.

    Attributes:
        channels: of images.
        categories: their names, in the order of their numbers.
        words: that captions use, for a tokenizer fitted to them.
        attributes, means, deviations: name, mean and standard deviation of each.
        dimensions: of points, features included; 0 where there are none.
        augmentation: number of values that describe the augmentation of an image.
        factor: side of an image over the side of the network's input.
        bits: of each value in an image, 8 or 16.
        value_range: values of the source that 0 and 1 of an image stand for, [low, high]; None
            where they are those of its integers.
        alpha: what the last of 2 or 4 channels is: "none" (a channel like the others), "straight"
            alpha, or "premultiplied" alpha.
        more: what other contexts need, by their names.
        untrained: those of `categories` that no training image has, since all of their images are
            held out.
        added_categories: how many of `categories`, the last ones, the model that was fine-tuned
            did not know.
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
    added_categories: int = 0
    more: dict[str, Any] = field(default_factory=dict)
