"""Several conditioners side by side; none at all is the unconditional model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

from torch import Tensor, nn

from sfumato.condition import NO_CONDITION, NO_CONTEXT, Condition, ContextSizes
from sfumato.conditioners.attributes import AttributesConditioner
from sfumato.conditioners.augmentation import AugmentationConditioner
from sfumato.conditioners.category import CategoryConditioner
from sfumato.conditioners.doodle import DoodleConditioner
from sfumato.conditioners.image import ImageConditioner, ReferenceConditioner
from sfumato.conditioners.learned_text import WordsConditioner
from sfumato.conditioners.points import PointsConditioner
from sfumato.conditioners.pretrained_text import PretrainedTextConditioner

ConditionerModule = (
    AttributesConditioner
    | AugmentationConditioner
    | CategoryConditioner
    | DoodleConditioner
    | ImageConditioner
    | PointsConditioner
    | PretrainedTextConditioner
    | ReferenceConditioner
    | WordsConditioner
)


class Joint(nn.Module):
    """Lays the conditions of its parts side by side: vectors and maps by channels, tokens one after another."""

    def __init__(self, parts: Mapping[str, ConditionerModule], *, factor: int = 1) -> None:
        """`parts` by the name of the context that each reads; `factor` is the side of a picture over that of what the network sees."""
        super().__init__()
        self.factor = factor
        self.parts = nn.ModuleDict(parts)
        self._parts = tuple(parts.values())  # the same, with their own types
        self.sizes = reduce(ContextSizes.beside, (part.sizes.folded(factor) for part in parts.values()), NO_CONTEXT)

    def forward(self, context: Mapping[str, Any], batch_size: int, *, draws: Tensor | None = None) -> Condition:
        """The condition of a batch.

        Args:
            context: what is known of each picture, by name; what is missing asks for nothing.
            draws: uniform in [0, 1), (B, parts): a part asks for nothing where its draw is below its `dropout`, and what lies above it
                decides how captions are varied. None drops and varies nothing.
        """
        conditions = []
        for number, part in enumerate(self._parts):
            condition = part(_told(part, context, draws, number), batch_size)
            if draws is not None:
                dropped = (draws[:, number] < part.dropout).to(next(iter(condition.slots().values())).device)
                condition = condition.replaced_where(dropped, part.null(batch_size))
            conditions.append(condition.folded(self.factor))  # each by itself: its places are the same whatever lies beside it
        return reduce(Condition.beside, conditions, NO_CONDITION)

    def derive(self, images: Tensor, context: Mapping[str, Any], *, seed: int, first: int) -> dict[str, Any]:
        """The context that training uses: what the data hold, and what is made from the pictures (B, C, H, W) themselves.

        Keyed by the samples' numbers, `first` and following.
        """
        made = dict(context)
        for part in self._parts:
            made |= part.derive(images, context, seed=seed, first=first)
        return made

    def null(self, batch_size: int) -> Condition:
        """The condition that asks for nothing."""
        return reduce(Condition.beside, (part.null(batch_size).folded(self.factor) for part in self._parts), NO_CONDITION)


def _told(part: ConditionerModule, context: Mapping[str, Any], draws: Tensor | None, number: int) -> Mapping[str, Any]:
    """What a part is told: of captions, training varies the spelling."""
    return part.varied(context, draws[:, number]) if draws is not None and isinstance(part, WordsConditioner) else context
