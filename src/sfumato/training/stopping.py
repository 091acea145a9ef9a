"""When to stop: what the errors on held-out and on training images say about a run.

A look holds the errors of the averaged model on images that it has not seen and on images that it
trains on. The verdict compares looks image by image: whether the model still learns, whether it
knows its own images better than new ones, and whether the error on new images rises.

The thresholds come from trainings of sets of 60 to 1,797 images (docs/evaluation.md): at the least
error on unseen images, the ratio of the errors was 1.29 to 1.35 whatever the set and the network;
bounds at 1.25 and 1.5, and a rise, never fired before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch

from sfumato.training.denoising_error import FEW_IMAGES, Estimate, mean_interval
from sfumato.training.evidence import DRIFT_LIMIT, SURE, Comparison, Copies, Look

LEANS, OVERFITS = 1.25, 1.5  # ratio of the error on held-out images to that on training images
MIN_FALL = 0.01  # of the error, in the last fifth of the views, that counts as learning
FEWEST_LOOKS, FEWEST_HELD_OUT = 3, FEW_IMAGES
ONE_ERROR = 0.68  # level of an interval of one standard error to either side
IN_A_ROW = 2  # looks at which a rule must hold
LAST_FIFTH, LAST_THIRD = 4 / 5, 2 / 3
UNMEASURED = (
    "nothing is held out, so that neither the error on new images nor memorization can be measured: "
    "look at the samples"
)
FORGOTTEN = "it did at every look: use a lower learning rate, fewer steps or preservation"

State = Literal[
    "too early",
    "cannot tell",
    "learning",
    "leans",
    "overfitting",
    "copying",
    "forgetting",
    "converged",
]
HARMFUL: frozenset[State] = frozenset({"overfitting", "copying", "forgetting"})
STOPS: frozenset[State] = HARMFUL | {"converged"}
# what a run may stop at by itself
STOP_AT: dict[str, frozenset[State]] = {
    "never": frozenset(),
    "overfitting": HARMFUL,
    "converged": STOPS,
}


def change(before: Look, after: Look, *, level: float = SURE) -> Estimate:
    """Return the change of the error on the same held-out images, as a share of it before."""
    values = torch.tensor(after.held_out).double() - torch.tensor(before.held_out).double()
    return Estimate(*(value / before.error for value in mean_interval(values, level=level)))


class Rules(NamedTuple):
    """Which rules hold at a look, and the figures that they compare."""

    ratio: Estimate
    rise: Estimate
    fall: Estimate
    leans: bool
    rises: bool
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
        rises=rise.low > 0,
        # a rise alone may be a step that was too long
        overfits=now.ratio.low > 1 and (rise.low > 0 or (now.ratio.low > OVERFITS and not falls)),
        # few images show no fall surely: it must be small too
        converged=since.high >= 0 and since.mean > -MIN_FALL,
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
        best_step: see `best`.
        best_base, base: that step's, and the last one's, comparison with the base of a fine-tuning.
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
    best_base: Comparison | None
    base: Comparison | None

    @property
    def stop(self) -> bool:
        """Whether longer training is of no use, or does harm."""
        return self.state in STOPS

    @property
    def harmful(self) -> bool:
        """Whether the model has become worse since its best step."""
        return self.state in HARMFUL

    def plain(self) -> dict[str, Any]:
        """Return the verdict as plain data, for JSON."""
        plain = asdict(self)
        estimates = {name: getattr(self, name).plain() for name in ("ratio", "rise", "fall")}
        compared = {
            name: None if value is None else value.summary()
            for name, value in (("best_base", self.best_base), ("base", self.base))
        }
        use_best = self.harmful or self.base is not None
        return {**plain, **estimates, **compared, "stop": self.stop, "use_best": use_best}


def verdict(looks: Sequence[Look]) -> StoppingVerdict:
    """Return what at least one look says.

    What says stop must hold at two looks in a row, or be a sure rise where the ratio leans too.
    Copying comes before forgetting, that before overfitting, and that before a ratio that leans to it.
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
        best_base=kept.base,
        base=now.base,
    )


def best(looks: Sequence[Look]) -> Look:
    """Return the look whose weights to use.

    It is the earliest one that no later one was better than by more than a standard error of the
    difference, image by image: where two are equal, the earlier has seen the training images less
    often. Of fewer than twelve held-out images the least error decides.

    A fine-tuning is given few images and has its base to fall back on: there it is the latest look
    whose gain lies within the interval of the largest, among those that do not forget.
    """
    kept = [look for look in looks if not look.forgets]
    if not kept:
        return min(looks, key=lambda look: (look.base and look.base.drift) or 0.0)
    now = kept[-1]
    if not now.held_out:
        return now
    if now.base is not None:
        return _latest_gain(kept)
    if len(now.held_out) < FEWEST_HELD_OUT:
        return min(kept, key=lambda look: look.error)
    return _earliest(kept)


def _earliest(looks: Sequence[Look]) -> Look:
    kept = looks[0]
    for look in looks[1:]:
        if change(kept, look, level=ONE_ERROR).high < 0:
            kept = look
    return kept


def _latest_gain(looks: Sequence[Look]) -> Look:
    gains = [look.base.gain for look in looks if look.base is not None and look.base.gain]
    lowest = max(gains).low  # of the interval of the largest gain
    return next(
        look
        for look, gain in zip(reversed(looks), reversed(gains), strict=True)
        if gain.mean >= lowest
    )


def _state(looks: Sequence[Look], found: Rules, copies: Copies | None) -> State:
    if copies is not None and copies.found:
        return "copying"
    if looks[-1].forgets:
        return "forgetting"
    if len(looks) < FEWEST_LOOKS:
        return "too early"
    recent = [found, *(rules(looks[: len(looks) - number]) for number in range(1, IN_A_ROW))]
    if (found.leans and found.rises) or all(look.overfits for look in recent):
        return "overfitting"
    if len(looks[-1].held_out) < FEWEST_HELD_OUT:
        return "cannot tell"
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
    if state == "forgetting" and now.base is not None:
        return (
            f"stop: the model forgets what its base knew (change {now.base.drift:.0%} of the base's "
            f"error, limit {DRIFT_LIMIT:.0%}); "
            + (f"use step {kept.step}" if not kept.forgets else FORGOTTEN)
        )
    if state == "too early":
        return f"too early to say: {len(looks)} of {FEWEST_LOOKS} looks at held-out images"
    if state == "cannot tell" and not now.held_out:
        return UNMEASURED
    if state == "cannot tell":
        return (
            f"{len(now.held_out)} held-out images are too few to say when to stop "
            f"({FEWEST_HELD_OUT} are needed); more images help, or a larger share of them "
            "(data.holdout=0.5); judged by "
            f"them, step {kept.step} is the one to use"
        )
    if state == "overfitting" and found.rise.low > 0:
        return (
            f"stop: the model overfits; {where}, and the error on held-out images has risen by "
            f"{found.rise.mean:.0%} since"
        )
    if state == "overfitting":
        return (
            f"stop: the model overfits; the error on held-out images is {describe_ratio(ratio)} that on "
            f"training images and no longer falls; {where}"
        )
    if state == "leans":
        return (
            f"the error on held-out images is {describe_ratio(ratio)} that on training images: longer "
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


def describe_ratio(ratio: Estimate) -> str:
    """Return a ratio of errors with its interval, in words."""
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
