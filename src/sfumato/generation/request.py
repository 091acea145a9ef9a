"""Sampling requests, and their conversion to model inputs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sfumato.condition import ContextValues, select_rows, to_device
from sfumato.conditioners import CompositeConditioner, ConditioningInfo
from sfumato.contexts import CONTEXTS, Context, by_keyword, user_contexts
from sfumato.contexts.image_inputs import batch_of_images
from sfumato.contexts.protocol import RequestInfo
from sfumato.errors import ConfigError, ShapeError, closest


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleRequest:
    """A request for images: contexts, and perhaps an image to start from.

    Attributes:
        contexts: values by keyword of `Pipeline.sample`, such as `prompt`; each is for all images,
            or several to cycle through.
        image: images to start from, to complete or to restore, (C, H, W) or (n, C, H, W) in [0, 1].
        strength: how much of the way to noise `image` is sent before it is denoised: 0 returns it,
            1 ignores it. None starts from noise.
        mask: where `image` is regenerated, 1 there and 0 where it is kept, (1, H, W) or (n, 1, H,
            W).
        size: height and width in pixels; None for the size that the model was trained at.
    """

    contexts: Mapping[str, Any] = field(default_factory=dict)
    image: Tensor | None = None
    strength: float | None = None
    mask: Tensor | None = None
    size: tuple[int, int] | None = None

    @classmethod
    def of(
        cls,
        *,
        image: Tensor | None = None,
        strength: float | None = None,
        mask: Tensor | None = None,
        size: tuple[int, int] | None = None,
        **contexts: Any,
    ) -> SampleRequest:
        """Create a request from keywords; contexts that are None are left to the model.

        Raises:
            ConfigError: for a keyword that no context has.
        """
        known = by_keyword(CONTEXTS.values())
        for keyword in contexts:
            if keyword not in known:
                raise ConfigError(
                    f"unknown argument {keyword!r}",
                    where="sample",
                    hint=f"{closest(keyword, known)}contexts are {', '.join(known)}",
                )
        values = {keyword: value for keyword, value in contexts.items() if value is not None}
        return cls(contexts=values, image=image, strength=strength, mask=mask, size=size)

    def names(self, contexts: Mapping[str, Context]) -> set[str]:
        """Return the names of contexts that have a value or a negative value in the request."""
        return {
            name
            for name, context in contexts.items()
            if any(keyword in self.contexts for keyword in context.keywords)
            or (context.uses_init_image and self.image is not None)
        }


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest:
    """A request for a number of images, checked against what a model reads.

    Attributes:
        context: by name, B of each.
        negative: by name, B of each to lead away from.
        start: the images to start from, (B, C, H, W) in [-1, 1]; zeros where none is given.
        strength: how much of the way to noise they are sent.
        known: 1 where `start` is kept, (B, 1, H, W).
    """

    context: ContextValues
    negative: ContextValues
    start: Tensor
    strength: float = 1.0
    known: Tensor | None = None

    @classmethod
    def of(
        cls, context: ContextValues, image_shape: tuple[int, int, int], num: int
    ) -> ResolvedRequest:
        """Create a request for images from pure noise, with a context that is known to fit."""
        return cls(context=context, negative={}, start=torch.zeros(num, *image_shape))

    @property
    def is_image_to_image(self) -> bool:
        """Whether `start` matters: full strength ignores it, except where it is known."""
        return self.strength < 1 or self.known is not None

    @property
    def is_inpainting(self) -> bool:
        """Whether a part of `start` is kept, so that the rest has to agree with it."""
        return self.known is not None and bool((self.known > 0).any())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the contexts that are given, or led away from."""
        return tuple(dict.fromkeys([*self.context, *self.negative]))

    def rows(self, chosen: slice, device: torch.device) -> ResolvedRequest:
        """Return the request for some of the images, on a device."""
        known = None if self.known is None else self.known[chosen].to(device)
        return ResolvedRequest(
            context=to_device(select_rows(self.context, chosen), device),
            negative=to_device(select_rows(self.negative, chosen), device),
            start=self.start[chosen].to(device),
            strength=self.strength,
            known=known,
        )


def keeps_a_part(mask: Tensor | None) -> bool:
    """Return whether a mask (1 where the image is regenerated) keeps any of it."""
    return mask is not None and bool((mask < 1).any())


def require_context(
    guidance: float | Mapping[str, float], contexts: Mapping[str, Context], *requests: SampleRequest
) -> None:
    """Refuse guidance without effect: a scale other than 1 on a context that no request has.

    Args:
        contexts: the contexts that steer the model, by name.
    Raises:
        ConfigError: saying what would have to be requested.
    """
    requested = {name for request in requests for name in request.names(contexts)}
    scales = guidance if isinstance(guidance, Mapping) else {} if requested else {"": guidance}
    for name, scale in scales.items():
        # what is neither is refused where scales are read
        known = math.isfinite(scale) and (not name or name in contexts)
        if known and scale != 1 and name not in requested:
            lacks = (
                f"no {name} is given"
                if name
                else "no context is given"
                if contexts
                else "the model is unconditional"
            )
            ways = [contexts[read].keywords[0] for read in ([name] if name else contexts)]
            raise ConfigError(
                f"guidance {scale:g} has no effect: {lacks}",
                where="sample",
                hint=f"give {' or '.join(ways)}, or leave guidance out"
                if ways
                else "leave guidance out",
            )


def resolve_request(
    request: SampleRequest,
    conditioner: CompositeConditioner,
    info: ConditioningInfo,
    image_shape: tuple[int, int, int],
    num: int,
) -> ResolvedRequest:
    """Convert a request to model inputs, for `num` images of `image_shape` (C, H, W).

    Raises:
        ConfigError, ShapeError: naming what the model does not read or know, or what cannot be.
    """
    contexts = user_contexts(conditioner)
    _check_read(request, contexts)
    height, width = image_shape[1:]
    start, known = torch.zeros(num, *image_shape), None
    if request.image is not None:
        start = batch_of_images(request.image, image_shape, num, "image")
    if request.mask is not None:
        known = (1 - batch_of_images(request.mask, (1, height, width), num, "mask")) / 2
    batch: dict[str, Any] = {}
    negative: dict[str, Any] = {}
    for name, context in contexts.items():
        request_info = RequestInfo(
            info=info, conditioner=conditioner.parts[name], size=(height, width), num=num
        )
        for keyword in context.keywords:
            if keyword in request.contexts:
                value = request.contexts[keyword]
                if keyword == context.negative:
                    negative[name] = context.parse_negative(value, request_info)
                else:
                    batch[name] = context.parse(value, request_info)
        if context.uses_init_image and request.image is not None:
            batch[name] = context.from_start(start, known, request_info)
    strength = 1.0 if request.strength is None else float(request.strength)
    return ResolvedRequest(
        context=batch, negative=negative, start=start, strength=strength, known=known
    )


def _check_read(request: SampleRequest, contexts: Mapping[str, Context]) -> None:
    """Raise ConfigError unless everything in a request can be satisfied."""
    read, known = by_keyword(contexts.values()), by_keyword(CONTEXTS.values())
    for keyword in request.contexts:
        if keyword not in read:
            raise ConfigError(
                f"this model was not trained with {keyword} conditioning",
                where="sample",
                hint=f"it is steered by {_listed(contexts) or 'nothing'}; train with "
                f"conditioner.{known[keyword].name} to change that",
            )
    strength, starts = (
        request.strength,
        any(context.uses_init_image for context in contexts.values()),
    )
    if strength is not None and not 0 <= strength <= 1:
        raise ConfigError(
            f"strength {strength}", where="sample", hint="use 0 (keep the image) to 1 (ignore it)"
        )
    if request.image is None and (request.mask is not None or strength is not None):
        raise ConfigError(
            "a mask or a strength without an image", where="sample", hint="give `image` too"
        )
    if request.image is not None and request.mask is None and strength is None and not starts:
        raise ConfigError(
            "an image was given without strength or mask",
            where="sample",
            hint="give a strength from 0 to 1 to start from it, or a mask to regenerate a part "
            "of it",
        )


def _listed(contexts: Collection[str]) -> str:
    return ", ".join(contexts)


def require_size(size: tuple[int, int], factor: int) -> None:
    """Raise ShapeError for a size that cannot be sampled.

    Args:
        factor: side of an image over that of its latents.
    """
    if min(size) < factor or any(side % factor for side in size):
        raise ShapeError(
            f"images of {size[0]} x {size[1]} pixels",
            where="sample",
            hint=f"use sides that are multiples of {factor}"
            if factor > 1
            else "use sides of at least one pixel",
        )
