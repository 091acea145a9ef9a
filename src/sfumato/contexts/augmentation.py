"""Augmentation: what was done to a training image, which no request asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfumato.conditioners import AugmentationConditioner, ConditioningInfo
from sfumato.contexts.protocol import Context, Encoder
from sfumato.data import Dataset


class Augmentation(Context):
    """Numbers that say how a training image was changed; zeros afterwards."""

    name = "augmentation"

    def build(
        self, config: None, facts: ConditioningInfo, encoder: Encoder
    ) -> AugmentationConditioner | None:
        return AugmentationConditioner(labels=facts.augmentation) if facts.augmentation else None

    def facts(self, config: None, dataset: Dataset) -> Mapping[str, Any]:
        return {"augmentation": dataset.config.augment.labels}
