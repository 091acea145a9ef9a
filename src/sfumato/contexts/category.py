"""Categories: one for each image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato.conditioners import CategoryConditioner, CategoryConfig, ConditioningInfo
from sfumato.contexts.protocol import Context, Encoder, Measured, Metric, RequestInfo, cycled
from sfumato.errors import ConfigError, closest


class Category(Context):
    """One of the set's categories."""

    name = "category"
    config = CategoryConfig
    lacking = ("categories", "sort the images into one sub-folder for each category")

    def build(
        self, config: CategoryConfig, facts: ConditioningInfo, encoder: Encoder
    ) -> CategoryConditioner:
        """Build the conditioner; raise ConfigError if the training set has no categories."""
        self.require(facts.categories)
        return CategoryConditioner(config, categories=len(facts.categories))

    def parse(self, value: str | int | Sequence[str | int], asked: RequestInfo) -> Tensor:
        """Return the indices (num,) of one or several names; an integer is taken as a name.

        Raises:
            ConfigError: for a category that is unknown or was never trained.
        """
        facts = asked.facts
        names = [str(value)] if isinstance(value, str | int) else [str(name) for name in value]
        for name in names:
            _require_known(name, facts)
        return torch.tensor(
            cycled([facts.categories.index(name) for name in names], asked.num, "categories")
        )

    def words(self, values: Tensor, facts: ConditioningInfo) -> list[str]:
        """Return the name of each category, "" for an index out of range such as -1."""
        known = facts.categories
        return [known[number] if 0 <= number < len(known) else "" for number in values.tolist()]

    def in_turn(self, num: int, facts: ConditioningInfo) -> Tensor:
        """Return the indices 0, 1, ... of all categories in turn, (num,)."""
        return torch.arange(num) % max(1, len(facts.categories))

    def metrics(self, measured: Measured) -> dict[str, tuple[str, Metric]]:
        """Return the category accuracy, or nothing if there is no classifier."""
        classify, labels = measured.classify, measured.values
        if classify is None:
            return {}
        return {"category accuracy": ("higher", lambda x, i: (classify(x) == labels[i]).double())}


def trained_categories(facts: ConditioningInfo) -> tuple[str, ...]:
    """Return the categories that the model has seen."""
    return tuple(name for name in facts.categories if name not in facts.untrained)


def _require_known(name: str, facts: ConditioningInfo) -> None:
    known = trained_categories(facts)
    if name in facts.untrained:
        raise ConfigError(
            f"category {name!r} was never trained: all of its images are held out",
            where="sample",
            hint=f"choose among {', '.join(known[:20])}; or train with more images of it",
        )
    if name not in known:
        raise unknown("category", name, known)


def unknown(what: str, name: str, known: Sequence[str]) -> ConfigError:
    """Return the error for a name that the model does not know."""
    return ConfigError(
        f"no {what} {name!r}",
        where="sample",
        hint=f"{closest(name, known)}the model knows {', '.join(known[:20])}",
    )
