"""Augmentation: what was done to a training image; requests cannot set it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfumato.conditioners import AugmentationConditioner, ConditioningInfo
from sfumato.contexts.protocol import Context, Encoder
from sfumato.data import Dataset


class Augmentation(Context):
    """Numbers that say how a training image was changed; zeros in sampling."""

    name = "augmentation"
    is_user_input = False

    def build(
        self, config: None, info: ConditioningInfo, encoder: Encoder
    ) -> AugmentationConditioner | None:
        """Build the conditioner; None if the augmentation makes no labels."""
        return AugmentationConditioner(labels=info.augmentation) if info.augmentation else None

    def info_fields(self, config: None, dataset: Dataset) -> Mapping[str, Any]:
        """Return the number of labels that describe an augmentation, 0 for none."""
        return {"augmentation": dataset.config.augment.labels}
