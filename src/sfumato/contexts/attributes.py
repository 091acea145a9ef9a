"""Attributes: numbers and labels, several of which hold at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sfumato.conditioners import AttributesConditioner, AttributesConfig, ConditioningInfo
from sfumato.contexts.category import unknown_name_error
from sfumato.contexts.protocol import Context, Encoder, RequestInfo, cycle
from sfumato.data import Dataset
from sfumato.errors import ConfigError, DataError


class Attributes(Context):
    """Numbers by name, each known or not."""

    name = "attributes"
    config = AttributesConfig
    missing_data_hint = ("attributes", "give them in metadata, as `attributes`")

    def build(
        self, config: AttributesConfig, info: ConditioningInfo, encoder: Encoder
    ) -> AttributesConditioner:
        """Build the conditioner; raise ConfigError if the training set has no attributes."""
        self.require(info.attributes)
        return AttributesConditioner(
            config, names=info.attributes, mean=info.means, deviation=info.deviations
        )

    def info_fields(self, config: AttributesConfig, dataset: Dataset) -> Mapping[str, Any]:
        """Return names, means and standard deviations of the training set's attributes."""
        table = dataset.annotations.attributes
        means, deviations = table.moments(dataset.training)
        return {"attributes": table.names, "means": means, "deviations": deviations}

    def carried(
        self, config: AttributesConfig, before: ConditioningInfo, now: ConditioningInfo
    ) -> ConditioningInfo:
        """Keep means and deviations; raise DataError if other attributes are given."""
        if now.attributes != before.attributes:
            differing = sorted(set(now.attributes) ^ set(before.attributes))
            raise DataError(
                f"the images have other attributes than those that the run began with: "
                f"{', '.join(differing[:5])}",
                where="attributes",
                hint="give the images the same attributes, or train a new run",
            )
        return replace(now, means=before.means, deviations=before.deviations)

    def parse(
        self, value: Mapping[str, float] | Sequence[Mapping[str, float]], request: RequestInfo
    ) -> Tensor:
        """Return the values (num, D) of one or several mappings, NaN where a name is missing.

        Raises:
            ConfigError: for an unknown attribute, or a value that is not finite.
        """
        several = [value] if isinstance(value, Mapping) else list(value)
        rows = [_row(one, request.info.attributes) for one in several]
        return torch.stack(cycle(rows, request.num, "attributes"))


def _row(attributes: Mapping[str, float], known: tuple[str, ...]) -> Tensor:
    values = torch.full((len(known),), math.nan)
    for name, value in attributes.items():
        if name not in known:
            raise unknown_name_error("attribute", name, known)
        if not math.isfinite(value):
            raise ConfigError(
                f"attribute {name} = {value}", where="sample", hint="use a finite number"
            )
        values[known.index(name)] = value
    return values
