"""Categories: one for each image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato.conditioners import (
    CategoryConfig,
    ClassLabelsConfig,
    Conditioner,
    ConditioningInfo,
)
from sfumato.contexts.protocol import Context, Encoder, Metric, MetricInputs, RequestInfo, cycle
from sfumato.data import Dataset
from sfumato.errors import ConfigError, DataError, closest

AnyCategoryConfig = CategoryConfig | ClassLabelsConfig


class Category(Context):
    """One of the set's categories."""

    name = "category"
    config = AnyCategoryConfig
    missing_data_hint = ("categories", "sort the images into one sub-folder for each category")

    def build(
        self, config: AnyCategoryConfig, info: ConditioningInfo, encoder: Encoder
    ) -> Conditioner:
        """Build the conditioner; raise ConfigError if the training set has no categories."""
        self.require(info.categories)
        return config.build(info.categories, added=info.added_categories)

    def carried(
        self, config: AnyCategoryConfig, before: ConditioningInfo, now: ConditioningInfo
    ) -> ConditioningInfo:
        """Return the information as it is; raise DataError if there are new categories."""
        new = [name for name in now.categories if name not in before.categories]
        if new:
            raise DataError(
                f"{len(new)} of the categories are new to the run, whose model cannot take up more: "
                f"{', '.join(new[:5])}",
                where="category",
                hint="leave these images out (data.exclude), train a new run, or fine-tune this one "
                "(`sfumato finetune RUN SOURCE` adds categories)",
            )
        return now

    def parse(self, value: str | int | Sequence[str | int], request: RequestInfo) -> Tensor:
        """Return the indices (num,) of one or several names; an integer is taken as a name.

        Raises:
            ConfigError: for a category that is unknown or has no training images.
        """
        info = request.info
        names = [str(value)] if isinstance(value, str | int) else [str(name) for name in value]
        for name in names:
            _require_known(name, info)
        return torch.tensor(
            cycle([info.categories.index(name) for name in names], request.num, "categories")
        )

    def words(self, values: Tensor, info: ConditioningInfo) -> list[str]:
        """Return the name of each category, "" for an index out of range such as -1."""
        known = info.categories
        return [known[number] if 0 <= number < len(known) else "" for number in values.tolist()]

    def enumerate_values(self, num: int, info: ConditioningInfo) -> Tensor:
        """Return the indices of all trained categories, repeated in order, (num,)."""
        trained = [info.categories.index(name) for name in trained_categories(info)] or [0]
        return torch.tensor(trained)[torch.arange(num) % len(trained)]

    def known_values(
        self, info: ConditioningInfo, dataset: Dataset, prompts: Sequence[str]
    ) -> Tensor | None:
        """Return the indices of the base's categories that no new image has."""
        present = set(dataset.labels.tolist())
        known = range(len(info.categories) - info.added_categories)
        numbers = [
            number
            for number in known
            if number not in present and info.categories[number] not in info.untrained
        ]
        return torch.tensor(numbers) if numbers else None

    def metrics(self, inputs: MetricInputs) -> dict[str, tuple[str, Metric]]:
        """Return the category accuracy; nothing without a classifier.

        It is NaN for conditions without a category.
        """
        classify, labels = inputs.classify, inputs.values
        if classify is None:
            return {}

        def accuracy(images: Tensor, indices: Tensor) -> Tensor:
            requested = labels[indices]
            return torch.where(requested >= 0, (classify(images) == requested).double(), torch.nan)

        return {"category accuracy": ("higher", accuracy)}


def trained_categories(info: ConditioningInfo) -> tuple[str, ...]:
    """Return the categories that the model was trained on."""
    return tuple(name for name in info.categories if name not in info.untrained)


def _require_known(name: str, info: ConditioningInfo) -> None:
    known = trained_categories(info)
    if name in info.untrained:
        raise ConfigError(
            f"category {name!r} has no training images: all of its images are held out",
            where="sample",
            hint=f"choose among {', '.join(known[:20])}; or train with more images of it",
        )
    if name not in known:
        raise unknown_name_error("category", name, known)


def unknown_name_error(kind: str, name: str, known: Sequence[str]) -> ConfigError:
    """Return the error for a name of this kind that the model does not know."""
    return ConfigError(
        f"no {kind} {name!r}",
        where="sample",
        hint=f"{closest(name, known)}the model knows {', '.join(known[:20])}",
    )
