"""Whether a set has enough images: before training from how often each will be seen, after it from
the verdict.

The number of views at which a model begins to memorize is about the same for small sets of
different sizes (Bonnaire et al. 2025, arXiv:2505.17638; docs/evaluation.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sfumato.data import AugmentConfig
from sfumato.training.stopping import LEANS, StoppingVerdict, describe_ratio

# Views of each image at which the error on unseen images was least: trainings of 49 to 204 images
# (digits, emoji, CIFAR-10) without dropout and augmentation (docs/evaluation.md).
BEST_VIEWS = (95, 165)
# until which the error did not rise with the preset's dropout and augmentation: 60 digits, 452 views
PROTECTED_VIEWS = 450
# at which the errors on unseen and on training images were equal: 1,597 digits, 19 views
UNNOTICED_VIEWS = 20
SMALL = 5_000  # images; no number of views was measured for larger sets
BEST = (
    f"{BEST_VIEWS[0]} to {BEST_VIEWS[1]} views at which small sets without augmentation and dropout "
    "were best"
)


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What the number of views says before a training.

    Attributes:
        sentence: in words, with the number of images and views.
        change: what to change, where the images will be seen too often; "" otherwise.
    """

    sentence: str
    change: str = ""


def is_protected(augment: AugmentConfig, network: nn.Module) -> bool:
    """Return whether a training has both augmentation that does not leak and dropout."""
    drops = any(isinstance(part, nn.Dropout) and part.p > 0 for part in network.modules())
    return augment.karras > 0 and drops


def most_views(images: int, *, protected: bool) -> float:
    """Return how often each image may be seen before the set is memorized; infinite if unknown."""
    if images >= SMALL:
        return float("inf")
    return PROTECTED_VIEWS if protected else BEST_VIEWS[1]


def before_training(
    images: int, views: float, *, protected: bool, by: str = "this budget", stops: bool = False
) -> Outlook:
    """Return what to expect of a training that sees each of `images` images `views` times.

    Args:
        protected: see `is_protected`.
        by: what the number of views follows from.
        stops: whether the run ends by itself when it overfits.
    """
    outlook = _outlook(images, views, protected=protected, by=by)
    if not (stops and outlook.change):
        return outlook
    return Outlook(sentence=f"{outlook.sentence}; the run stops when it overfits")


def _outlook(images: int, views: float, *, protected: bool, by: str) -> Outlook:
    seen = f"{images:,} images, each seen about {_number(views)} times by {by}"
    if views < UNNOTICED_VIEWS:
        return Outlook(sentence=f"{seen}: too few views to memorize")
    if views < BEST_VIEWS[0]:
        return Outlook(sentence=f"{seen}, fewer than the {BEST}")
    if images >= SMALL:
        return Outlook(
            sentence=f"{seen}: sets of this size have not been measured ({BEST}); the verdict "
            "while training says when to stop"
        )
    if views <= BEST_VIEWS[1]:
        return Outlook(sentence=f"{seen}, about the {BEST}: see the verdict while training")
    if not protected:
        return Outlook(
            sentence=f"{seen}, more than the {BEST}",
            change=f"set budget.epochs={BEST_VIEWS[1]} or stop=overfitting, add images, or set "
            "data.augment.karras=0.12 and network.dropout=0.1",
        )
    if views <= PROTECTED_VIEWS:
        return Outlook(
            sentence=f"{seen}, more than the {BEST}; with both, a set of 60 was still at its best "
            f"after {PROTECTED_VIEWS}: see the verdict while training"
        )
    return Outlook(
        sentence=f"{seen}, more than the {PROTECTED_VIEWS} until which a set of 60 with "
        f"augmentation and dropout was at its best (without, {BEST_VIEWS[0]} to {BEST_VIEWS[1]})",
        change=f"set budget.epochs={PROTECTED_VIEWS} or stop=overfitting, or add images",
    )


def _number(views: float) -> str:
    return f"{views:.1f}" if views < 10 else f"{views:,.0f}"


def after_training(found: StoppingVerdict, images: int) -> str:
    """Return whether a set had enough images, from the verdict of a run on it."""
    held_out, _ = found.n
    ratio, seen = found.ratio, f"{images:,} images"
    if found.state == "copying" and found.copies is not None:
        return (
            f"{seen} are too few for this network and budget: {found.copies.count} of "
            f"{found.copies.samples} samples are near-duplicates of them"
        )
    if found.state in ("overfitting", "leans"):
        return (
            f"{seen} are too few for this network and budget: the error on new images is "
            f"{describe_ratio(ratio)} that on them"
        )
    if not held_out:
        return f"nothing is held out, so that whether {seen} are enough cannot be said"
    if found.state == "too early":
        return f"too early to say whether {seen} are enough"
    if found.state == "cannot tell" or not ratio.high <= LEANS:  # nor if it is NaN
        return (
            f"{held_out} held-out images are too few to say whether {seen} are enough: the error on "
            f"them is {describe_ratio(ratio)} that on training images"
        )
    so_far = " so far" if found.state == "learning" else ""
    knows = "does not know them better" if ratio.low <= 1 else "knows them only a little better"
    return (
        f"{seen} are enough for this network{so_far}: after {_number(found.views)} views of each "
        f"it {knows} than new ones ({describe_ratio(ratio)})"
    )
