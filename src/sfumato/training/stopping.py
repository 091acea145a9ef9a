"""When to stop: what the errors on held-out and on training images say about a run.

A look holds the errors of the averaged model on images that it has not seen and on images that it
trains on. The verdict compares looks image by image: whether the model still learns, whether it
knows its own images better than new ones, and whether the error on new images rises.

The thresholds come from trainings of sets of 60 to 1,797 images (docs/evaluation.md): at the least
error on unseen images, the ratio of the errors was 1.29 to 1.35 whatever the set and the network;
bounds at 1.25 and 1.5, and a rise, never fired before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sfumato.training.denoising_error import FEW_IMAGES, Estimate, mean_interval, t_quantile

SURE = 0.98  # two-sided: each bound holds with 99 %
LEANS, OVERFITS = 1.25, 1.5  # ratio of the error on held-out images to that on training images
MIN_FALL = 0.01  # of the error, in the last fifth of the views, that counts as learning
FEWEST_LOOKS, FEWEST_HELD_OUT = 3, FEW_IMAGES
IN_A_ROW = 2  # looks at which a rule must hold
LAST_FIFTH, LAST_THIRD = 4 / 5, 2 / 3

State = Literal[
    "too early", "cannot tell", "learning", "leans", "overfitting", "copying", "converged"
]
STOPS: frozenset[State] = frozenset({"overfitting", "copying", "converged"})
# what a run may stop at by itself
STOP_AT: dict[str, frozenset[State]] = {
    "never": frozenset(),
    "overfitting": frozenset({"overfitting", "copying"}),
    "converged": STOPS,
}


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
class Look:
    """The errors of a model at one step.

    Attributes:
        step: of training.
        views: how often each training image was seen, on average.
        held_out, seen: mean squared error of the predicted noise on each held-out image and on
            each of some training images, over all levels; the same images at every look.
        copies: among samples, if any were drawn at this step.
    """

    step: int
    views: float
    held_out: tuple[float, ...]
    seen: tuple[float, ...]
    copies: Copies | None = None

    @classmethod
    def read(cls, plain: dict[str, Any]) -> Look:
        """Return the look that `plain` was made of."""
        copies = plain.get("copies")
        return cls(
            step=plain["step"],
            views=plain["views"],
            held_out=tuple(plain["held_out"]),
            seen=tuple(plain["seen"]),
            copies=None if copies is None else Copies(**copies),
        )

    def plain(self) -> dict[str, Any]:
        """Return the look as plain data, for JSON."""
        return asdict(self)

    @cached_property
    def error(self) -> float:
        """The mean error on held-out images."""
        return sum(self.held_out) / len(self.held_out)

    @cached_property
    def ratio(self) -> Estimate:
        """The error on held-out images over that on training images."""
        return error_ratio(torch.tensor(self.held_out), torch.tensor(self.seen), level=SURE)


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


def change(before: Look, after: Look) -> Estimate:
    """Return the change of the error on the same held-out images, as a share of it before."""
    values = torch.tensor(after.held_out).double() - torch.tensor(before.held_out).double()
    return Estimate(*(value / before.error for value in mean_interval(values, level=SURE)))


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


class Rules(NamedTuple):
    """Which rules hold at a look, and the figures that they compare."""

    ratio: Estimate
    rise: Estimate
    fall: Estimate
    leans: bool
    overfits: bool
    converged: bool
    learns: bool


def rules(looks: Sequence[Look]) -> Rules:
    """Apply the rules to the last of some looks, given those before it."""
    now = looks[-1]
    rise = change(min(looks, key=lambda look: look.error), now)
    fall = change(_latest(looks, LAST_FIFTH * now.views), now)
    since = change(_latest(looks, LAST_THIRD * now.views), now)
    falls = fall.high < 0
    return Rules(
        ratio=now.ratio,
        rise=rise,
        fall=fall,
        leans=now.ratio.low > LEANS,
        # a rise alone may be a step that was too long
        overfits=now.ratio.low > 1 and (rise.low > 0 or (now.ratio.low > OVERFITS and not falls)),
        converged=since.high >= 0,
        learns=falls and fall.mean < -MIN_FALL,
    )


def _latest(looks: Sequence[Look], views: float) -> Look:
    """Return the latest look at no more than some views, or the first."""
    return next((look for look in reversed(looks) if look.views <= views), looks[0])


@dataclass(frozen=True, kw_only=True)
class StoppingVerdict:
    """What the looks of a run say.

    Attributes:
        state: see the table in docs/evaluation.md.
        sentence: the state in words, with its figures.
        step, views: of the last look.
        ratio: error on held-out over error on training images, with 98 % interval.
        rise: change of the error on held-out images since it was least.
        fall: the same over the last fifth of the views.
        n: held-out and training images of a look.
        best_step: the earliest step whose error is not surely above that of a later one.
    """

    state: State
    sentence: str
    step: int
    views: float
    ratio: Estimate
    rise: Estimate
    fall: Estimate
    copies: Copies | None
    n: tuple[int, int]
    best_step: int

    @property
    def stop(self) -> bool:
        """Whether longer training is of no use, or does harm."""
        return self.state in STOPS

    @property
    def harmful(self) -> bool:
        """Whether the model has become worse since its best step."""
        return self.state in ("overfitting", "copying")

    def plain(self) -> dict[str, Any]:
        """Return the verdict as plain data, for JSON."""
        estimates = {name: getattr(self, name)._asdict() for name in ("ratio", "rise", "fall")}
        return {**asdict(self), **estimates, "stop": self.stop, "use_best": self.harmful}


def verdict(looks: Sequence[Look]) -> StoppingVerdict:
    """Return what at least one look says.

    What says stop must hold at two looks in a row. Copying comes before overfitting, and that
    before a ratio that leans to it.
    """
    now, found = looks[-1], rules(looks)
    kept = best(looks)
    copies = next((look.copies for look in reversed(looks) if look.copies is not None), None)
    state = _state(looks, found, copies)
    return StoppingVerdict(
        state=state,
        sentence=_sentence(state, looks, found, copies, kept),
        step=now.step,
        views=now.views,
        ratio=found.ratio,
        rise=found.rise,
        fall=found.fall,
        copies=copies,
        n=(len(now.held_out), len(now.seen)),
        best_step=kept.step,
    )


def best(looks: Sequence[Look]) -> Look:
    """Return the earliest look that no later one was surely better than.

    A look is replaced by a later one only if that is surely better, image by image: where the two
    are equal, the earlier has seen the training images less often.
    """
    kept = looks[0]
    for look in looks[1:]:
        if change(kept, look).high < 0:
            kept = look
    return kept


def _state(looks: Sequence[Look], found: Rules, copies: Copies | None) -> State:
    if copies is not None and copies.found:
        return "copying"
    if len(looks) < FEWEST_LOOKS:
        return "too early"
    if len(looks[-1].held_out) < FEWEST_HELD_OUT:
        return "cannot tell"
    recent = [found, *(rules(looks[: len(looks) - number]) for number in range(1, IN_A_ROW))]
    if all(look.overfits for look in recent):
        return "overfitting"
    if found.leans:
        return "leans"
    if all(look.converged for look in recent):
        return "converged"
    return "learning"


def _sentence(
    state: State, looks: Sequence[Look], found: Rules, copies: Copies | None, kept: Look
) -> str:
    now, ratio = looks[-1], found.ratio
    where = f"best at step {kept.step} ({kept.views:.3g} views of each image)"
    if state == "copying" and copies is not None:
        return (
            f"stop: {copies.count} of {copies.samples} samples are near-duplicates of training "
            f"images (of real images, {copies.real_count} of {copies.real}); {where}"
        )
    if state == "too early":
        return f"too early to say: {len(looks)} of {FEWEST_LOOKS} looks at held-out images"
    if state == "cannot tell":
        return (
            f"{len(now.held_out)} held-out images are too few to say when to stop "
            f"({FEWEST_HELD_OUT} are needed); more images or a larger data.holdout help"
        )
    if state == "overfitting" and found.rise.low > 0:
        return (
            f"stop: the model overfits; {where}, and the error on held-out images has risen by "
            f"{found.rise.mean:.0%} since"
        )
    if state == "overfitting":
        return (
            f"stop: the model overfits; the error on held-out images is {_times(ratio)} that on "
            f"training images and no longer falls; {where}"
        )
    if state == "leans":
        return (
            f"the error on held-out images is {_times(ratio)} that on training images: longer "
            "training will make the model copy; more images, augmentation or a smaller network help"
        )
    if state == "converged":
        return f"stop: converged; nothing was learned since step {_flat_since(looks).step}"
    if found.learns:
        low, high = -found.fall.high, -found.fall.low
        return (
            f"still learning: the error on held-out images fell by {-found.fall.mean:.1%} "
            f"[{low:.1%}, {high:.1%}] in the last fifth of the training"
        )
    return "still learning, slowly: the error on held-out images falls by less than 1 % a fifth"


def _times(ratio: Estimate) -> str:
    return f"{ratio.mean:.2f} x [{ratio.low:.2f}, {ratio.high:.2f}]"


def _flat_since(looks: Sequence[Look]) -> Look:
    """Return the earliest look since which the error has not surely fallen."""
    return next(look for look in looks if change(look, looks[-1]).high >= 0)


def next_mark(views: float) -> float:
    """Return the views at which the look after one at `views` is due: 1, 2, 4, 8, then x 1.2."""
    mark = 1.0
    while mark <= views:
        mark *= 2 if mark < 8 else 1.2
    return mark
