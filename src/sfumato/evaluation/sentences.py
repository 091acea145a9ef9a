"""What the figures of an evaluation say, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.data import Dataset
from sfumato.evaluation.distances import FRECHET_IMAGES_PER_DIMENSION
from sfumato.evaluation.memorization import Memorization, beside_unseen, copies_sentence
from sfumato.evaluation.quality import QualityMeter, dimensions
from sfumato.evaluation.rows import FidelityRow, Reference

RELIABLE = 25  # held-out images, below which it is said how rough their figures are


def describe(
    row: FidelityRow, held_out: FidelityRow, left_out: Memorization, name: str = "training"
) -> list[str]:
    """Return a sentence on copies and one on quality.

    Args:
        row: of samples; held_out: of held-out images.
        left_out: figures of training images that are compared with the others.
        name: what the training images are called.
    """
    unseen = [held_out.memorization.copies, left_out.copies]
    copied = row.memorization.copies
    copying = copied is not None and beside_unseen(copied, unseen).found
    return [
        f"{row.name}: {copies_sentence(row.memorization, unseen, name=name)}.",
        f"{row.name}: {_describe_quality(row, held_out, copying=copying)}.",
    ]


def _describe_quality(row: FidelityRow, held_out: FidelityRow, *, copying: bool) -> str:
    quality, real = row.quality, held_out.quality
    if quality is None or quality.good is None or quality.variety is None:
        return "too few images to say how good they are"
    beside = ""
    if real is not None and real.good is not None and real.variety is not None:
        beside = f" (held-out images: {real.good.value:.0%} and {real.variety.value:.0%})"
    doubt = "; as it copies, this says nothing about new images" if copying else ""
    return (
        f"about {quality.good.value:.0%} of its images look like real ones and they cover "
        f"{quality.variety.value:.0%} of the variety{beside}{doubt}"
    )


def remarks_on(
    dataset: Dataset,
    reference: Reference,
    quality: QualityMeter,
    rows: Sequence[FidelityRow],
    name: str,
) -> list[str]:
    """Return sentences on what the figures rest on."""
    remarks: list[str] = []
    held_out = len(reference.held_out)
    if held_out < RELIABLE:
        count = "no image is" if not held_out else "1 image is" if held_out == 1 else (
            f"only {held_out} images are"
        )  # fmt: skip
        remarks.append(
            f"{count} held out: figures of new images are missing or may be far off by chance; "
            f"copies are judged by {name} images that are left out in turn"
        )
    if not any(row.quality and row.quality.frechet for row in rows):
        fewest = FRECHET_IMAGES_PER_DIMENSION * dimensions(quality.network)
        remarks.append(
            f"no Fréchet distance (FID): it takes {fewest:,} samples and {name} images in the "
            f"features of {quality.network.name}, and mostly measures their number below"
        )
    left = [
        f"{len(part) - len(used)} {what}"
        for part, used, what in (
            (dataset.training, reference.training, f"{name} images"),
            (dataset.holdout, reference.held_out, "held-out images"),
        )
        if len(used) < len(part)
    ]
    if left:
        remarks.append(
            f"{' and '.join(left)} of another shape or without a category are not compared, but "
            "copies are searched in all"
        )
    if dataset.config.channels in (2, 4):
        remarks.append("alpha is not compared; colours are those over black")
    elif dataset.config.channels > 4:
        remarks.append(f"3 of {dataset.config.channels} channels are compared")
    return remarks
