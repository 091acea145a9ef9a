"""What conditions a denoiser: three optional slots, the same for all networks and conditioners.

A `Condition` whose slots are all `None` is the unconditional one; nothing else marks
"unconditional".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.errors import ShapeError


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Context for a batch of B images.

    Attributes:
        vector: one summary per image, shape (B, D).
        tokens: a sequence per image, shape (B, L, D).
        token_mask: True for valid tokens, shape (B, L); None if all are valid.
        spatial: maps aligned with the image, shape (B, C, H, W); 1 x 1 maps are the same
            everywhere.
    """

    vector: Tensor | None = None
    tokens: Tensor | None = None
    token_mask: Tensor | None = None
    spatial: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        """Apply `function` to every slot that is filled."""
        return Condition(**{name: function(slot) for name, slot in self.slots().items()})

    def slots(self) -> dict[str, Tensor]:
        """Return the filled slots by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: slot for name, slot in values.items() if slot is not None}

    def combine(self, other: Condition, function: Callable[[Tensor, Tensor], Tensor]) -> Condition:
        """Apply `function` slot by slot to two conditions that fill the same slots.

        Raises:
            ShapeError: if one fills a slot that the other leaves empty.
        """
        mine, theirs = self.slots(), other.slots()
        if mine.keys() != theirs.keys():
            raise ShapeError(
                f"two conditions fill different slots: {sorted(mine) or ['none']} and "
                f"{sorted(theirs) or ['none']}",
                hint="make both with the same conditioner (its `null` gives the empty context)",
            )
        return Condition(**{name: function(slot, theirs[name]) for name, slot in mine.items()})

    def concat_batch(self, other: Condition) -> Condition:
        """Stack two batches of conditions along the batch dimension."""
        return self.combine(other, lambda a, b: _concat(a, b, dim=0))

    def replace_where(self, mask: Tensor, other: Condition) -> Condition:
        """Take `other` where `mask` (B,) is True, e.g. to drop contexts sample by sample."""

        def choose(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(mask.view(-1, *[1] * (a.ndim - 1)), b.to(a.dtype), a)

        return self.combine(other, choose)

    def concat_features(self, other: Condition) -> Condition:
        """Concatenate two conditions: vectors and maps along channels, tokens along the sequence."""
        mine, theirs = self.slots(), other.slots()
        if (
            "tokens" in mine
            and "tokens" in theirs
            and ("token_mask" in mine) != ("token_mask" in theirs)
        ):
            for slots in (mine, theirs):
                slots.setdefault(
                    "token_mask",
                    torch.ones(
                        slots["tokens"].shape[:2], dtype=torch.bool, device=slots["tokens"].device
                    ),
                )
        both = {
            name: _concat(slot, theirs[name], dim=1)
            for name, slot in mine.items()
            if name in theirs
        }
        return Condition(**{**mine, **theirs, **both})

    def pixel_unshuffle(self, factor: int) -> Condition:
        """Move factor x factor pixels of the maps into channels, for a network's coarser grid.

        No pixel is lost: sides are padded to multiples of `factor`, and 1 x 1 maps are repeated.
        """
        if self.spatial is None:
            return self
        height, width = self.spatial.shape[2:]
        if height == width == 1:
            return replace(self, spatial=self.spatial.repeat_interleave(factor**2, dim=1))
        padded = F.pad(self.spatial, (0, -width % factor, 0, -height % factor), mode="replicate")
        return replace(self, spatial=F.pixel_unshuffle(padded, factor))

    def lerp(self, other: Condition, weights: Tensor) -> Condition:
        """Interpolate towards `other`, whose weights are `weights` (B,).

        A token is valid if it is valid in either condition of nonzero weight.
        """

        def interpolate(a: Tensor, b: Tensor) -> Tensor:
            weight = weights.view(-1, *[1] * (a.ndim - 1))
            if a.dtype == torch.bool:
                return (a & (weight < 1)) | (b & (weight > 0))
            return torch.lerp(a, b.to(a.dtype), weight.to(a))

        return self.combine(other, interpolate)

    def expand(self, batch_size: int) -> Condition:
        """Repeat a condition of one image for a batch; one of `batch_size` images is unchanged."""
        return self.map(lambda slot: slot.expand(batch_size, *slot.shape[1:]))


# the values of B images by the name of the context: tensors (B, ...) and lists of B texts
ContextValues = Mapping[str, Any]


def select_rows(context: ContextValues, chosen: slice) -> dict[str, Any]:
    """Select some of the images of a context."""
    return {name: value[chosen] for name, value in context.items()}


def to_device(context: ContextValues, device: torch.device) -> dict[str, Any]:
    """Return the context with its tensors on `device`."""
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in context.items()
    }


def reorder(context: ContextValues, order: Sequence[int]) -> dict[str, Any]:
    """Return the context with its images in another order."""
    return {
        name: value[torch.tensor(order)] if isinstance(value, Tensor) else [value[i] for i in order]
        for name, value in context.items()
    }


def _concat(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Concatenate along `dim`; smaller maps are first upsampled to the other's height and width."""
    if a.ndim == 4 and a.shape[2:] != b.shape[2:]:
        size = (max(a.shape[2], b.shape[2]), max(a.shape[3], b.shape[3]))
        a, b = (
            x if x.shape[2:] == size else F.interpolate(x, size=size, mode="nearest")
            for x in (a, b)
        )
    return torch.cat([a, b.to(a.dtype)], dim=dim)


NO_CONDITION = Condition()


@dataclass(frozen=True, kw_only=True)
class ContextSizes:
    """Channels of each slot that a network is built for; 0 where a slot is absent."""

    vector: int = 0
    tokens: int = 0
    spatial: int = 0

    @classmethod
    def of(cls, condition: Condition) -> ContextSizes:
        """Return the sizes of an actual condition."""
        channels = {"vector": 1, "tokens": 2, "spatial": 1}
        slots = condition.slots()
        return cls(
            **{name: slots[name].shape[dim] for name, dim in channels.items() if name in slots}
        )

    def concat_features(self, other: ContextSizes) -> ContextSizes:
        """Return the sizes of both together; tokens of both must have the same channels.

        Raises:
            ShapeError: if they do not.
        """
        if self.tokens and other.tokens and self.tokens != other.tokens:
            raise ShapeError(
                f"tokens of {self.tokens} and {other.tokens} channels",
                hint="give both conditioners one token size",
            )
        return ContextSizes(
            vector=self.vector + other.vector,
            tokens=self.tokens or other.tokens,
            spatial=self.spatial + other.spatial,
        )

    def pixel_unshuffle(self, factor: int) -> ContextSizes:
        """Return the sizes after `Condition.pixel_unshuffle`: `spatial` is multiplied by factor^2."""
        return replace(self, spatial=self.spatial * factor**2)


NO_CONTEXT = ContextSizes()
