"""The one table of contexts, from which configuration keys, keywords of `Pipeline.sample`, previews
and evaluations are read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sfumato.conditioners import CompositeConditioner, ConditioningInfo
from sfumato.contexts.attributes import Attributes
from sfumato.contexts.augmentation import Augmentation
from sfumato.contexts.category import Category
from sfumato.contexts.doodle import Doodle
from sfumato.contexts.image import DegradedImage, Reference
from sfumato.contexts.points import Points
from sfumato.contexts.protocol import Context
from sfumato.contexts.resizing import Resizing
from sfumato.contexts.text import Text

CONTEXTS: dict[str, Context] = {
    context.name: context
    for context in (
        Category(),
        Attributes(),
        Text(),
        Resizing(),
        DegradedImage(),
        Reference(),
        Doodle(),
        Points(),
        Augmentation(),
    )
}


def user_contexts(conditioner: CompositeConditioner) -> dict[str, Context]:
    """Return the contexts that a request to a model may set, by name."""
    return {name: CONTEXTS[name] for name in conditioner.user_inputs}


def enumerate_values(
    reads: Iterable[str], num: int, info: ConditioningInfo
) -> dict[str, Any] | None:
    """Return a batch of all values, repeated in order, for a model that reads at most one context.

    None if it reads several, or one whose values cannot be listed.
    """
    batch = {name: CONTEXTS[name].enumerate_values(num, info) for name in reads}
    return None if len(batch) > 1 or any(values is None for values in batch.values()) else batch


def part_of(conditioner: CompositeConditioner, kind: type[Context]) -> Any:
    """Return a model's part for a context; None if the model does not read it."""
    return dict(conditioner.parts.items()).get(kind.name)


def by_keyword(contexts: Iterable[Context]) -> dict[str, Context]:
    """Return contexts by each keyword of `Pipeline.sample` that they accept."""
    return {keyword: context for context in contexts for keyword in context.keywords}
