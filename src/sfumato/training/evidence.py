"""What is known of a model at a step of its training: errors on held-out and on training images,
copies among its samples, and the comparison with its base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sfumato.training.denoising_error import Estimate, t_quantile

SURE = 0.98  # two-sided: each bound holds with 99 %
# Change of the predicted noise, over the base's own error on the same images, above which the model
# has forgotten. Measured on digits without 7, tuned on ten 7s: docs/fine-tuning.md.
DRIFT_LIMIT = 0.1


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Near-duplicates of training images among samples, beside those among real images.

    Attributes:
        count, samples: near-duplicates among the samples, and the number of these.
        real_count, real: the same of real images, each compared with the training images that it
            is not grouped with.
    """

    count: int
    samples: int
    real_count: int
    real: int

    @property
    def found(self) -> bool:
        """Whether samples are copies more often than real images are, by Fisher's exact test."""
        return fisher(self.count, self.samples, self.real_count, self.real) < (1 - SURE) / 2


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A fine-tuned model beside its base.

    Attributes:
        held_out, seen: errors of the base on the images of a look.
        gain: error of the base minus that of the model on held-out images, with its 95 % interval,
            over the error of the base: above 0 where the model is better. None if nothing is held
            out.
        drift: mean squared change of the predicted noise on images of what the base knew, over the
            base's error on them; None where nothing of the kind is known.
    """

    held_out: tuple[float, ...] = ()
    seen: tuple[float, ...] = ()
    gain: Estimate | None = None
    drift: float | None = None

    @classmethod
    def read(cls, plain: dict[str, Any]) -> Comparison:
        """Return the comparison that `plain` was made of."""
        gain = plain["gain"]
        return cls(
            held_out=tuple(plain["held_out"]),
            seen=tuple(plain["seen"]),
            gain=None if gain is None else Estimate.read(gain),
            drift=plain["drift"],
        )

    @property
    def forgets(self) -> bool:
        """Whether the drift is above its limit."""
        return self.drift is not None and self.drift > DRIFT_LIMIT

    def summary(self) -> dict[str, Any]:
        """Return gain and drift as plain data, for JSON."""
        return {"gain": None if self.gain is None else self.gain.plain(), "drift": self.drift}

    def figures(self) -> list[str]:
        """Return gain and drift in words, as far as they were measured."""
        gain, drift = self.gain, self.drift
        return [
            *([] if gain is None else [f"gain on new images {gain.percent()}"]),
            *([] if drift is None else [f"change of what the base knew {drift:.1%}"]),
        ]


@dataclass(frozen=True, kw_only=True)
class Look:
    """The errors of a model at one step.

    Attributes:
        step: of training.
        views: how often each training image was seen since training on these data began, on average.
        begins: the step at which it began, which is above 0 where the data of the run were changed.
        held_out, seen: mean squared error of the predicted noise on each held-out image, if there
            are any, and on each of some training images, over all levels; the same images at every
            look.
        copies: among samples, if any were drawn at this step.
        samples: other figures of these samples by name, as plain data; nothing is decided by them.
        base: the model beside its base, in a fine-tuning.
    """

    step: int
    views: float
    held_out: tuple[float, ...]
    seen: tuple[float, ...]
    copies: Copies | None = None
    samples: dict[str, Any] = field(default_factory=dict)
    base: Comparison | None = None
    begins: int = 0

    @classmethod
    def read(cls, plain: dict[str, Any]) -> Look:
        """Return the look that `plain` was made of."""
        copies, base = plain.get("copies"), plain.get("base")
        return cls(
            step=plain["step"],
            views=plain["views"],
            held_out=tuple(plain["held_out"]),
            seen=tuple(plain["seen"]),
            copies=None if copies is None else Copies(**copies),
            samples=plain.get("samples", {}),
            base=None if base is None else Comparison.read(base),
            begins=plain.get("begins", 0),
        )

    def plain(self) -> dict[str, Any]:
        """Return the look as plain data, for JSON."""
        plain = asdict(self)
        if self.base is not None and self.base.gain is not None:
            plain["base"]["gain"] = self.base.gain.plain()
        return plain

    @property
    def forgets(self) -> bool:
        """Whether what the base of a fine-tuning knew has changed too much."""
        return self.base is not None and self.base.forgets

    @cached_property
    def error(self) -> float:
        """The mean error on held-out images."""
        return sum(self.held_out) / len(self.held_out) if self.held_out else math.nan

    @cached_property
    def ratio(self) -> Estimate:
        """The error on held-out images over that on training images.

        In a fine-tuning, each error is taken as a share of the base's on the same image: the base
        has seen neither, so that its own ratio tells how much harder one set is.
        """
        held_out, seen = torch.tensor(self.held_out), torch.tensor(self.seen)
        if self.base is not None:
            held_out = held_out / torch.tensor(self.base.held_out)
            seen = seen / torch.tensor(self.base.seen)
        return error_ratio(held_out, seen, level=SURE)


def error_ratio(held_out: Tensor, seen: Tensor, *, level: float) -> Estimate:
    """Return the ratio of the geometric means of errors (n,) and (m,), with Welch's interval."""
    first, second = held_out.double().log(), seen.double().log()
    mean = float(first.mean() - second.mean())
    half = math.inf
    if min(len(first), len(second)) > 1:
        parts = [float(part.var()) / len(part) for part in (first, second)]
        freedom = [
            part**2 / (len(values) - 1) for part, values in zip(parts, (first, second), strict=True)
        ]
        if sum(parts) > 0:
            half = t_quantile(level, sum(parts) ** 2 / sum(freedom)) * math.sqrt(sum(parts))
        else:
            half = 0.0
    return Estimate(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def fisher(count: int, total: int, other_count: int, other_total: int) -> float:
    """Return the probability of at least `count` of the hits in the first of two sets, by chance.

    Source: Fisher 1935, "The logic of inductive inference".
    """
    hits = count + other_count
    ways = [
        math.comb(total, first) * math.comb(other_total, hits - first)
        for first in range(count, min(hits, total) + 1)
    ]
    return sum(ways) / math.comb(total + other_total, hits)


def looks_of(lines: Sequence[dict[str, Any]], data: Mapping[str, Any]) -> list[Look]:
    """Return the looks of a run at the data that it has now.

    Of a run whose data were changed, others met other images, and are compared with none of these.

    Args:
        lines: of looks.jsonl; data: the record of the data, data.json.
    """
    looks = [Look.read(line) for line in lines]
    return [look for look in looks if look.begins == data.get("begins", looks[-1].begins)]
