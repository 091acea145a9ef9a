"""What a person asks pictures for, and the same as the tensors that a model is steered by."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.condition import Context, on_device, rows
from sfumato.conditioners import Facts, ImageConditioner, Joint
from sfumato.errors import ConfigError, ShapeError

MOST_POINTS = 100_000
NAMED = 10  # words in one message


class PromptNote(UserWarning):
    """Something about a prompt that a person should know: the images may not be what it says."""


class Truncated(PromptNote):
    """A prompt is longer than the model reads; the message says which part it sees."""


class Unfamiliar(PromptNote):
    """A prompt has words that the model did not see in training; the message names them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """What pictures are asked for. Each is for all of them, or several to cycle through; None leaves it to the model.

    Attributes:
        category: names.
        prompt: texts; negative: one text that guidance leads away from.
        attributes: numbers by name, those that matter.
        doodle: line drawings, dark on light, (1, H, W) or (n, 1, H, W) in [0, 1].
        points: clouds (N, D), or several.
        reference: pictures to make variations of, (C, H, W) or (n, C, H, W) in [0, 1].
        image: pictures to start from, to complete or to restore, (C, H, W) or (n, C, H, W) in [0, 1].
        strength: how much of the way to noise `image` is sent before it is made anew: 0 returns it, 1 forgets it. None starts from noise.
        mask: where `image` is made anew, 1 there and 0 where it stays, (1, H, W) or (n, 1, H, W).
    """

    category: str | int | Sequence[str | int] | None = None
    prompt: str | Sequence[str] | None = None
    negative: str | None = None
    attributes: Mapping[str, float] | Sequence[Mapping[str, float]] | None = None
    doodle: Tensor | None = None
    points: Tensor | Sequence[Tensor] | None = None
    reference: Tensor | None = None
    image: Tensor | None = None
    strength: float | None = None
    mask: Tensor | None = None

    @property
    def contexts(self) -> tuple[str, ...]:
        """Names of the contexts that something is given for, or led away from."""
        named = {"prompt": "text", "negative": "text"}
        given = (field.name for field in fields(self) if getattr(self, field.name) is not None)
        return tuple(dict.fromkeys(named.get(name, name) for name in given if name not in ("strength", "mask")))


@dataclass(frozen=True, kw_only=True)
class Request:
    """The same for a number of pictures, checked against what a model reads.

    Attributes:
        context: by name, B of each.
        negative: a text to lead away from.
        start: the pictures to start from, (B, C, H, W) in [-1, 1]; zeros where none is given.
        strength: how much of the way to noise they are sent.
        known: 1 where `start` stays, (B, 1, H, W).
    """

    context: Context
    negative: str | None
    start: Tensor
    strength: float
    known: Tensor | None

    @classmethod
    def of(cls, context: Context, image_shape: tuple[int, int, int], num: int) -> Request:
        """For pictures from pure noise, steered by a context that is known to fit."""
        return cls(context=context, negative=None, start=torch.zeros(num, *image_shape), strength=1.0, known=None)

    @property
    def begins_at_picture(self) -> bool:
        """Whether `start` matters: full strength forgets it, but for what is known of it."""
        return self.strength < 1 or self.known is not None

    @property
    def fills(self) -> bool:
        """Whether a part of `start` stays, so that the rest has to agree with it."""
        return self.known is not None and bool((self.known > 0).any())

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the contexts that are asked for, or asked not to be."""
        return tuple(dict.fromkeys([*self.context, *([] if self.negative is None else ["text"])]))

    def rows(self, chosen: slice, device: torch.device) -> Request:
        """Some of the pictures."""
        known = None if self.known is None else self.known[chosen].to(device)
        context = on_device(rows(self.context, chosen), device)
        return Request(
            context=context, negative=self.negative, start=self.start[chosen].to(device), strength=self.strength, known=known
        )


def require_context(guidance: float | Mapping[str, float], reads: Collection[str], *asked: Asked) -> None:
    """Refuse guidance without effect: a scale other than 1 that acts on a context which is in none of `asked`.

    Args:
        reads: names of the contexts that steer the model.
    Raises:
        ConfigError: saying what would have to be given.
    """
    given = {name for one in asked for name in one.contexts if name in reads}
    scales = guidance if isinstance(guidance, Mapping) else {} if given else {"": guidance}
    for name, scale in scales.items():
        known = math.isfinite(scale) and (not name or name in reads)  # what is neither is refused where scales are read
        if known and scale != 1 and name not in given:
            lacks = f"no {name} is given" if name else "no context is given" if reads else "the model is steered by nothing"
            ways = [{"text": "prompt"}.get(read, read) for read in ([name] if name else reads)]
            raise ConfigError(
                f"guidance {scale:g} has nothing to act on: {lacks}",
                where="sample",
                hint=f"give {' or '.join(ways)}, or leave guidance out" if ways else "leave guidance out",
            )


def settled(asked: Asked, conditioner: Joint, facts: Facts, image_shape: tuple[int, int, int], num: int) -> Request:
    """What `asked` means to a model, for `num` pictures.

    Raises:
        ConfigError, ShapeError: naming what the model does not read or know, or cannot be.
    """
    _check_read(asked, conditioner)
    height, width = image_shape[1:]
    context: dict[str, Any] = {}
    if asked.category is not None:
        context["category"] = _categories(asked.category, facts, num)
    if asked.prompt is not None:
        context["text"] = _cycled([asked.prompt] if isinstance(asked.prompt, str) else list(asked.prompt), num, "prompt")
    texts = list(dict.fromkeys([*context.get("text", ()), *([] if asked.negative is None else [asked.negative])]))
    for text in texts:
        _say_if_cut(text, conditioner)
    if texts:
        _say_if_unfamiliar(texts, conditioner)
    if asked.attributes is not None:
        given = [asked.attributes] if isinstance(asked.attributes, Mapping) else list(asked.attributes)
        context["attributes"] = torch.stack(_cycled([_attributes(one, facts.attributes) for one in given], num, "attributes"))
    if asked.doodle is not None:
        context["doodle"] = _pictures(asked.doodle, (1, height, width), num, "doodle")
    if asked.points is not None:
        context["points"] = _clouds(asked.points, facts.dimensions, num)
    if asked.reference is not None:
        context["reference"] = _pictures(asked.reference, image_shape, num, "reference")
    start, known = torch.zeros(num, *image_shape), None
    if asked.image is not None:
        start = _pictures(asked.image, image_shape, num, "image")
    if asked.mask is not None:
        known = (1 - _pictures(asked.mask, (1, height, width), num, "mask")) / 2
    image = dict(conditioner.parts.items()).get("image")
    if asked.image is not None and isinstance(image, ImageConditioner):
        seen = start if known is None else start.masked_fill(known < 0.5, math.nan)
        context["image"] = image.config.lost.given(seen)
    strength = 1.0 if asked.strength is None else float(asked.strength)
    return Request(context=context, negative=asked.negative, start=start, strength=strength, known=known)


def _check_read(asked: Asked, conditioner: Joint) -> None:
    """Everything asked for can be met."""
    named = {"prompt": "text", "negative": "text"}
    steers = [name for name in conditioner.parts if name != "augmentation"]
    for field in fields(asked):
        name = named.get(field.name, field.name)
        if getattr(asked, field.name) is not None and name not in steers and name not in ("image", "strength", "mask"):
            raise ConfigError(
                f"the model does not read {field.name}",
                where="sample",
                hint=f"it is steered by {', '.join(steers) or 'nothing'}; train with conditioner.{name} to change that",
            )
    if asked.strength is not None and not 0 <= asked.strength <= 1:
        raise ConfigError(f"strength {asked.strength}", where="sample", hint="use 0 (the picture as it is) to 1 (a new one)")
    if asked.image is None and (asked.mask is not None or asked.strength is not None):
        raise ConfigError("a mask or a strength without a picture", where="sample", hint="give `image` too")
    if asked.image is not None and asked.mask is None and asked.strength is None and "image" not in steers:
        raise ConfigError(
            "nothing is said of what to do with the picture",
            where="sample",
            hint="give a strength from 0 to 1 to start from it, or a mask to paint anew a part of it",
        )


def _cycled(values: list[Any], num: int, what: str) -> list[Any]:
    if not values:
        raise ConfigError(f"an empty list of {what}", where="sample", hint="name at least one, or None for none")
    return [values[i % len(values)] for i in range(num)]


def _categories(category: str | int | Sequence[str | int], facts: Facts, num: int) -> Tensor:
    known = tuple(name for name in facts.categories if name not in facts.untrained)
    names = [str(category)] if isinstance(category, str | int) else [str(name) for name in category]
    for name in names:
        if name in facts.untrained:
            raise ConfigError(
                f"category {name!r} was never trained: all of its images are held out",
                where="sample",
                hint=f"choose among {', '.join(known[:20])}; or train with more images of it",
            )
        if name not in known:
            raise _unknown("category", name, known)
    return torch.tensor(_cycled([facts.categories.index(name) for name in names], num, "categories"))


def _unknown(what: str, name: str, known: Sequence[str]) -> ConfigError:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return ConfigError(f"no {what} {name!r}", where="sample", hint=f"{hint}the model knows {', '.join(known[:20])}")


def _attributes(given: Mapping[str, float], known: tuple[str, ...]) -> Tensor:
    values = torch.full((len(known),), math.nan)
    for name, value in given.items():
        if name not in known:
            raise _unknown("attribute", name, known)
        if not math.isfinite(value):
            raise ConfigError(f"attribute {name} = {value}", where="sample", hint="use a finite number")
        values[known.index(name)] = value
    return values


def _say_if_cut(text: str, conditioner: Joint) -> None:
    part = conditioner.parts["text"]
    if part.cuts(text):  # type: ignore[operator]
        read = part.read(text)  # type: ignore[operator]
        shown = read if len(read) <= 60 else f"{read[:40]} ... {read[-15:]}"
        warnings.warn(f"of a prompt of {len(text)} characters the model reads {len(read)}: {shown!r}", Truncated, stacklevel=4)


def _say_if_unfamiliar(texts: Sequence[str], conditioner: Joint) -> None:
    """Name those words that no caption contains in what is read of the texts, in one message."""
    part = conditioner.parts["text"]
    unknown = list(dict.fromkeys(word for text in texts for word in part.unknown(part.read(text))))  # type: ignore[operator]
    if not unknown:
        return
    shown = ", ".join(f'"{_printable(word if len(word) <= 40 else word[:37] + "...")}"' for word in unknown[:NAMED])
    more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
    how = "it is" if len(unknown) == 1 else "they are"
    meaning = "" if part.learns_letters else ", and letters mean nothing to this model, which was trained without spelled words"
    warnings.warn(
        f"the captions never contained: {shown}{more}; {how} read letter by letter{meaning}", Unfamiliar, stacklevel=4
    )


def _printable(word: str) -> str:
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in word)


def _pictures(given: Tensor, shape: tuple[int, int, int], num: int, what: str) -> Tensor:
    """(num, C, H, W) in [-1, 1] from one or several pictures in [0, 1], resized."""
    images = given[None] if given.ndim == 3 else given
    if images.ndim != 4 or images.shape[1] != shape[0] or not len(images) or min(images.shape[2:]) < 1:
        raise ShapeError(
            f"a {what} of shape {tuple(given.shape)}", where="sample", hint=f"give ({shape[0]}, H, W), or several of them"
        )
    images = images.float().cpu()
    if not images.isfinite().all() or images.min() < 0 or images.max() > 1:
        raise ShapeError(f"a {what} with values outside [0, 1]", where="sample", hint="divide 8-bit pixels by 255")
    if tuple(images.shape[2:]) != shape[1:]:
        images = F.interpolate(images, size=shape[1:], mode="bilinear", antialias=True).clamp(0, 1)
    return torch.stack(_cycled(list(images * 2 - 1), num, what))


def _clouds(given: Tensor | Sequence[Tensor], dimensions: int, num: int) -> Tensor:
    """(num, N, D), rows of NaN after the shorter ones."""
    clouds = [cloud.float().cpu() for cloud in ([given] if isinstance(given, Tensor) and given.ndim == 2 else given)]
    for cloud in clouds:
        if cloud.ndim != 2 or cloud.shape[1] != dimensions or not 1 <= len(cloud) <= MOST_POINTS:
            raise ShapeError(
                f"a point cloud of shape {tuple(cloud.shape)}", where="sample",
                hint=f"give N x {dimensions} with N from 1 to {MOST_POINTS}, as the model was trained on",
            )  # fmt: skip
        if not cloud.isfinite().all():
            raise ShapeError("a point cloud with values that are not finite", where="sample", hint="leave those points out")
    most = max((len(cloud) for cloud in clouds), default=1)
    padded = [torch.cat([cloud, cloud.new_full((most - len(cloud), dimensions), math.nan)]) for cloud in clouds]
    return torch.stack(_cycled(padded, num, "point clouds"))
