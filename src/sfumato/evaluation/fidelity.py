"""The fidelity of samples: a pipeline is compared with the data that it was trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato import randomness
from sfumato.contexts import enumerate_values
from sfumato.data import Dataset, to_float
from sfumato.errors import DataError
from sfumato.evaluation.adherence import wilson
from sfumato.evaluation.classifier import Classifier, labelled, train_classifier
from sfumato.evaluation.extractors import extractor, pooled
from sfumato.evaluation.frechet import FEWEST, frechet_distance
from sfumato.evaluation.memorization import Neighbours, nearest
from sfumato.generation.pipeline import Pipeline
from sfumato.generation.request import ResolvedRequest

LARGEST_TRAINING = 20_000  # images that distances are taken to
# share of an evaluation that is over when its features are known, as a progress bar shows it
LOOKING = 0.2


@dataclass(frozen=True, kw_only=True)
class Row:
    """Figures of one set of images: samples at a guidance scale, or the held-out images.

    Attributes:
        category_accuracy: share that the classifier classifies as the requested category, with its 95 %
            interval (Wilson); None without
            categories.
        frechet: distance to training images in the extractor's features, taken with `frechet_n`
            images, as many of each category, so
            that rows compare: category counts and n move it; None below `FEWEST` images.
        nearest: mean L2 distance to the nearest training image.
        copies: fraction with d1/d2 < 1/3, and `copies_interval`, its 95 % interval (Wilson).
    """

    name: str
    n: int
    category_accuracy: float | None
    interval: tuple[float, float] | None
    frechet: float | None
    frechet_n: int
    nearest: float
    copies: float
    copies_interval: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Rows of figures; the first is held-out real images, what a perfect model would get.

    Attributes:
        extractor: whose features the Fréchet distance is taken in.
        reference: images that it is taken to.
        classifier_accuracy: on held-out images, of what reads the samples; None without categories.
        training: images among which the nearest are looked for.
        remarks: sentences on how far these figures can be trusted.
    """

    extractor: str
    reference: int
    classifier_accuracy: float | None
    training: int
    rows: Sequence[Row]
    remarks: Sequence[str] = ()

    def plain(self) -> dict[str, Any]:
        """Return the figures as plain data, for JSON."""
        return asdict(self)


class Compared(NamedTuple):
    """Positions of the training and held-out images that are compared.

    They have the commonest shape, and a category if the data have categories.
    """

    training: NDArray[np.int64]
    holdout: NDArray[np.int64]


def compared(dataset: Dataset) -> Compared:
    """Return the images that an evaluation of a model of this dataset compares.

    Raises:
        DataError: if fewer than two held-out or four training images are left. This is known before
            anything is trained.
    """
    training, holdout = (
        dataset.with_common_shape(dataset.training),
        dataset.with_common_shape(dataset.holdout),
    )
    which = "held out"
    if len(dataset.categories) > 1:
        training, holdout = labelled(dataset, training), labelled(dataset, holdout)
        which = "held out and has a category"
    if len(holdout) < 2:
        count = "1 image is" if len(holdout) == 1 else "no image is"
        raise DataError(
            f"{count} {which}, of {len(dataset.entries)}; samples are compared with at least 2, "
            f"and reliably with {FEWEST}",
            where="evaluate",
            hint="train a new run on more images, or with a larger data.holdout such as 0.2",
        )
    if len(training) < 4:
        raise DataError(
            f"{len(training)} training images can be compared with; at least 4 are needed",
            where="evaluate",
            hint="train a new run on more images",
        )
    return Compared(training, holdout)


def balanced(labels: Tensor, each: int) -> Tensor:
    """Return the positions of the first `each` images of every category, or of all that it has."""
    return torch.cat([torch.nonzero(labels == label)[:each, 0] for label in labels.unique()])


def evaluate(
    pipeline: Pipeline,
    dataset: Dataset,
    *,
    num: int = 500,
    guidances: Sequence[float] = (1.0,),
    seed: int = 1,
    reader: Classifier | None = None,
    keep: Callable[[float, Tensor, Neighbours], None] | None = None,
    on_progress: Callable[[float, str], None] | None = None,
) -> Evaluation:
    """Generate `num` images for each guidance scale, and compare them with real ones.

    If the data have categories, a classifier trained on them classifies the samples, and the
    features are those of a second classifier; otherwise, the features come from a frozen network. A
    model that is steered by nothing but categories samples each in turn; other models sample with
    the conditions of held-out images.

    Args:
        reader: the classifier of the samples, if there are categories; by default, it is trained on
            the training images.
        keep: called with each scale, its images in [0, 1] and their nearest training images.
        on_progress: called with the fraction that is done, and what is being done.
    Raises:
        DataError: if there are too few images to compare: see `compared`.
    """
    trained_on, holdout = compared(dataset)
    has_categories = len(dataset.categories) > 1
    tell = on_progress or (lambda fraction, text: None)
    looking = (
        "training a classifier on the real images"
        if has_categories
        else "extracting features of the real images"
    )
    tell(0.0, looking)
    eyes = (
        _trained_eyes(dataset, trained_on, reader, lambda share: tell(LOOKING * share, looking))
        if has_categories
        else _frozen_eyes(dataset, trained_on)
    )
    training, held_out = (
        to_float(dataset.images(part)[0]) for part in (trained_on[:LARGEST_TRAINING], holdout)
    )
    kinds = max(1, len(dataset.categories))
    each = int(torch.bincount(_kinds(dataset, holdout), minlength=kinds).min())
    judge = RowMaker(eyes, training, max(1, min(each, num // kinds)))

    rows = [judge.row("held-out real images", held_out, _kinds(dataset, holdout))]
    context, asked = _asked(pipeline, dataset, holdout, num)
    read = {name: value for name, value in context.items() if name in pipeline.reads}
    for number, guidance in enumerate(guidances):
        tell(
            LOOKING + (1 - LOOKING) * number / len(guidances),
            f"{num} samples at guidance {guidance:g}",
        )
        request = ResolvedRequest.of(read, pipeline.image_shape, num)
        images = pipeline.sample_request(request, seed=seed, guidance=guidance, batch_size=100)
        rows.append(judge.row(f"samples, guidance {guidance:g}", images * 2 - 1, asked))
        if keep is not None:
            keep(guidance, images, nearest(images * 2 - 1, training))
    tell(1.0, "done")
    return Evaluation(
        extractor=eyes.name,
        reference=len(eyes.reference),
        classifier_accuracy=eyes.reader.held_out_accuracy if eyes.reader else None,
        training=len(training),
        rows=rows,
        remarks=_remarks(len(holdout), rows, len(eyes.reference)),
    )


def _remarks(held_out: int, rows: Sequence[Row], reference: int) -> list[str]:
    """Return sentences on what too few images mean for the figures."""
    found = []
    if held_out < FEWEST:
        found.append(
            f"only {held_out} images are held out: every figure in their row may be far off by "
            "chance"
        )
    without = [row for row in rows if row.frechet is None]
    if without:
        fewest = min(reference, *(row.frechet_n for row in without))
        found.append(
            f"a Fréchet distance is not given for {' and '.join(row.name for row in without)}: "
            f"it would be taken of {fewest} images, "
            f"and below {FEWEST} it mostly measures their number"
        )
    return found


def _kinds(dataset: Dataset, positions: NDArray[np.int64]) -> Tensor:
    """Return the category of each image; 0 for all if there are no categories."""
    labels = dataset.labels[torch.from_numpy(positions)]
    return labels if len(dataset.categories) > 1 else torch.zeros_like(labels)


def _asked(
    pipeline: Pipeline, dataset: Dataset, holdout: NDArray[np.int64], num: int
) -> tuple[dict[str, Any], Tensor]:
    """Return the conditions of `num` samples, and their categories.

    They are each category in turn, or those of held-out images.
    """
    listed = enumerate_values(pipeline.reads, num, pipeline.info)
    if listed is not None:
        each = torch.arange(num) % max(1, len(dataset.categories))
        return listed, each
    pixels, _, chosen = dataset.images(np.resize(holdout, num))
    context = pipeline.model.conditioner.training_context(
        to_float(pixels), dataset.context(chosen), seed=0, first=0
    )
    return context, _kinds(dataset, chosen)


class FeatureSpace(NamedTuple):
    """The space in which images are compared.

    `features` maps images in [-1, 1] to (n, d), `reference` holds those of training images, and
    `reader` classifies images.
    """

    name: str
    features: Callable[[Tensor], Tensor]
    reference: Tensor
    reader: Classifier | None


def _trained_eyes(
    dataset: Dataset,
    trained_on: NDArray[np.int64],
    reader: Classifier | None,
    on_progress: Callable[[float], None],
) -> FeatureSpace:
    """Train the classifier whose features are compared, and the one that classifies samples.

    The features of images that a classifier was trained on are unlike those of images that it has
    not seen. So the features come from one trained on half of the training images, and the
    reference is the other half: as new to it as the hold-out and the samples.
    """
    order = randomness.permutation(0, "evaluation", index=0, size=len(trained_on))
    seen, reference = (trained_on[part][:LARGEST_TRAINING] for part in np.array_split(order, 2))
    classifier = train_classifier(dataset, seen, on_progress=on_progress)
    labels = _kinds(dataset, reference)
    fewest = int(labels.unique(return_counts=True)[1].min())  # of the categories that this half has
    reference = reference[balanced(labels, fewest).numpy()]

    def features(images: Tensor) -> Tensor:
        return classifier.read(images)[1]

    return FeatureSpace(
        classifier.name,
        features,
        features(to_float(dataset.images(reference)[0])),
        reader or train_classifier(dataset, trained_on),
    )


def _frozen_eyes(dataset: Dataset, trained_on: NDArray[np.int64]) -> FeatureSpace:
    network = extractor("auto")
    features = partial(pooled, network)
    return FeatureSpace(
        network.name,
        features,
        features(to_float(dataset.images(trained_on[: LARGEST_TRAINING // 2])[0])),
        None,
    )


@dataclass(frozen=True)
class RowMaker:
    """Makes the rows of an evaluation.

    A Fréchet distance is taken of up to `each` images of every category.
    """

    eyes: FeatureSpace
    training: Tensor
    each: int

    def row(self, name: str, images: Tensor, asked: Tensor) -> Row:
        """Return figures of images (n, C, H, W) in [-1, 1] that were requested as `asked` (n,)."""
        neighbours = nearest(images, self.training)
        chosen = balanced(asked, self.each)
        reader = self.eyes.reader
        enough = min(len(chosen), len(self.eyes.reference)) >= FEWEST
        right = float((reader.read(images)[0] == asked).double().mean()) if reader else None
        return Row(
            name=name,
            n=len(images),
            category_accuracy=right,
            interval=None if right is None else wilson(right, len(images)),
            frechet=frechet_distance(self.eyes.features(images[chosen]), self.eyes.reference)
            if enough
            else None,
            frechet_n=len(chosen),
            nearest=float(neighbours.first.mean()),
            copies=neighbours.copies,
            copies_interval=wilson(neighbours.copies, len(images)),
        )
