"""The fidelity of samples: they are compared with the dataset that the pipeline was trained on."""

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
from sfumato.evaluation.classifier import Classifier, select_labelled, train_classifier
from sfumato.evaluation.distances import FEWEST, frechet_distance
from sfumato.evaluation.extractors import extractor, pooled
from sfumato.evaluation.memorization import Neighbours, nearest
from sfumato.generation.pipeline import Pipeline
from sfumato.generation.request import ResolvedRequest

MAX_TRAINING_IMAGES = 20_000  # that samples are compared with
# fraction of the progress bar for the features of real images
FEATURES_FRACTION = 0.2


@dataclass(frozen=True, kw_only=True)
class FidelityRow:
    """Metrics of one set of images: samples at a guidance scale, or the held-out images.

    Attributes:
        category_accuracy: fraction that the classifier assigns to the requested category, with its
            95 % interval (Wilson); None without categories.
        frechet: Fréchet distance to training images in the extractor's features, of `frechet_n`
            images with equally many of each category, so that rows can be compared: it depends on
            both; None below `FEWEST` images.
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
    """Rows of metrics; the first is of held-out real images, which a perfect model would reach.

    Attributes:
        extractor: name of the network whose features the Fréchet distance compares.
        reference: number of reference images of the Fréchet distance.
        classifier_accuracy: accuracy on held-out images of the classifier of the samples; None
            without categories.
        training: number of training images among which the nearest are searched.
        remarks: sentences on the reliability of the metrics.
        compared_with: what the training images are called, if they are not those of the model.
    """

    extractor: str
    reference: int
    classifier_accuracy: float | None
    training: int
    rows: Sequence[FidelityRow]
    remarks: Sequence[str] = ()
    compared_with: str = "training"

    def plain(self) -> dict[str, Any]:
        """Return the metrics as plain data, for JSON."""
        return asdict(self)


class EvaluationSplit(NamedTuple):
    """Positions of the training and held-out images that samples are compared with.

    The images have the most common shape, and a category if the dataset has categories.
    """

    training: NDArray[np.int64]
    holdout: NDArray[np.int64]


def evaluation_split(dataset: Dataset) -> EvaluationSplit:
    """Return the images that samples of a model of this dataset are compared with.

    Raises:
        DataError: if fewer than two held-out or four training images are left.
    """
    training, holdout = (
        dataset.with_common_shape(dataset.training),
        dataset.with_common_shape(dataset.holdout),
    )
    status = "held out"
    if len(dataset.categories) > 1:
        training, holdout = select_labelled(dataset, training), select_labelled(dataset, holdout)
        status = "held out and has a category"
    if len(holdout) < 2:
        count = "1 image is" if len(holdout) == 1 else "no image is"
        raise DataError(
            f"{count} {status}, of {len(dataset.entries)}; samples are compared with at least 2, "
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
    return EvaluationSplit(training, holdout)


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
    classifier: Classifier | None = None,
    on_samples: Callable[[float, Tensor, Neighbours], None] | None = None,
    on_progress: Callable[[float, str], None] | None = None,
) -> Evaluation:
    """Generate `num` images for each guidance scale, and compare them with real ones.

    If the dataset has categories, a classifier trained on them classifies the samples, and the
    features are those of a second classifier; otherwise, they are those of a pretrained network. A
    model that is conditioned on nothing but categories samples each in turn; other models sample
    with the conditions of held-out images.

    Args:
        classifier: the classifier of the samples, if there are categories; by default, it is
            trained on the training images.
        on_samples: called with each scale, its images in [0, 1] and their nearest training images.
        on_progress: called with the fraction that is done, and a description of the current part.
    Raises:
        DataError: if there are too few images to compare: see `evaluation_split`.
    """
    training_positions, holdout = evaluation_split(dataset)
    has_categories = len(dataset.categories) > 1
    report = on_progress or (lambda fraction, text: None)
    activity = (
        "training a classifier on the real images"
        if has_categories
        else "extracting features of the real images"
    )
    report(0.0, activity)
    feature_space = (
        _classifier_features(
            dataset,
            training_positions,
            classifier,
            lambda fraction: report(FEATURES_FRACTION * fraction, activity),
        )
        if has_categories
        else _pretrained_features(dataset, training_positions)
    )
    training, held_out = (
        to_float(dataset.images(part)[0])
        for part in (training_positions[:MAX_TRAINING_IMAGES], holdout)
    )
    categories = max(1, len(dataset.categories))
    each = int(torch.bincount(_labels(dataset, holdout), minlength=categories).min())
    metrics = FidelityMetrics(feature_space, training, max(1, min(each, num // categories)))

    rows = [metrics.row("held-out real images", held_out, _labels(dataset, holdout))]
    context, labels = _conditions(pipeline, dataset, holdout, num)
    read = {name: value for name, value in context.items() if name in pipeline.reads}
    for number, guidance in enumerate(guidances):
        report(
            FEATURES_FRACTION + (1 - FEATURES_FRACTION) * number / len(guidances),
            f"{num} samples at guidance {guidance:g}",
        )
        request = ResolvedRequest.of(read, pipeline.image_shape, num)
        images = pipeline.sample_request(request, seed=seed, guidance=guidance, batch_size=100)
        rows.append(metrics.row(f"samples, guidance {guidance:g}", images * 2 - 1, labels))
        if on_samples is not None:
            on_samples(guidance, images, nearest(images * 2 - 1, training))
    report(1.0, "done")
    return Evaluation(
        extractor=feature_space.name,
        reference=len(feature_space.reference),
        classifier_accuracy=feature_space.classifier.held_out_accuracy
        if feature_space.classifier
        else None,
        training=len(training),
        rows=rows,
        remarks=_remarks(len(holdout), rows, len(feature_space.reference)),
    )


def _remarks(held_out: int, rows: Sequence[FidelityRow], reference: int) -> list[str]:
    """Return sentences on the effect of too few images on the metrics."""
    remarks = []
    if held_out < FEWEST:
        remarks.append(
            f"only {held_out} images are held out: every figure in their row may be far off by "
            "chance"
        )
    without = [row for row in rows if row.frechet is None]
    if without:
        fewest = min(reference, *(row.frechet_n for row in without))
        remarks.append(
            f"a Fréchet distance is not given for {' and '.join(row.name for row in without)}: "
            f"it would be computed from {fewest} images, "
            f"and below {FEWEST} it mostly measures their number"
        )
    return remarks


def _labels(dataset: Dataset, positions: NDArray[np.int64]) -> Tensor:
    """Return the category of each image; 0 for all if there are no categories."""
    labels = dataset.labels[torch.from_numpy(positions)]
    return labels if len(dataset.categories) > 1 else torch.zeros_like(labels)


def _conditions(
    pipeline: Pipeline, dataset: Dataset, holdout: NDArray[np.int64], num: int
) -> tuple[dict[str, Any], Tensor]:
    """Return the conditions of `num` samples, and their categories.

    They are each category in turn, or those of held-out images.
    """
    enumerated = enumerate_values(pipeline.reads, num, pipeline.info)
    if enumerated is not None:
        labels = torch.arange(num) % max(1, len(dataset.categories))
        return enumerated, labels
    pixels, _, chosen = dataset.images(np.resize(holdout, num))
    context = pipeline.model.conditioner.training_context(
        to_float(pixels), dataset.context(chosen), seed=0, first=0
    )
    # what was done to training images is not done to samples
    requested = {name: value for name, value in context.items() if name in pipeline.reads}
    return requested, _labels(dataset, chosen)


class FeatureSpace(NamedTuple):
    """The feature space in which images are compared.

    `features` maps images in [-1, 1] to (n, d), `reference` holds the features of training images,
    and `classifier` classifies images.
    """

    name: str
    features: Callable[[Tensor], Tensor]
    reference: Tensor
    classifier: Classifier | None


def _classifier_features(
    dataset: Dataset,
    training: NDArray[np.int64],
    classifier: Classifier | None,
    on_progress: Callable[[float], None],
) -> FeatureSpace:
    """Train the classifier whose features are compared, and the one that classifies samples.

    A classifier has other features for images that it was trained on than for new images. So the
    features come from a classifier trained on half of the training images, and the other half is
    the reference, which it was not trained on, like the held-out images and the samples.
    """
    order = randomness.permutation(0, "evaluation", index=0, size=len(training))
    fitted, reference = (training[part][:MAX_TRAINING_IMAGES] for part in np.array_split(order, 2))
    feature_classifier = train_classifier(dataset, fitted, on_progress=on_progress)
    labels = _labels(dataset, reference)
    fewest = int(labels.unique(return_counts=True)[1].min())  # of the categories in this half
    reference = reference[balanced(labels, fewest).numpy()]

    def features(images: Tensor) -> Tensor:
        return feature_classifier.predict(images)[1]

    return FeatureSpace(
        feature_classifier.name,
        features,
        features(to_float(dataset.images(reference)[0])),
        classifier or train_classifier(dataset, training),
    )


def _pretrained_features(dataset: Dataset, training: NDArray[np.int64]) -> FeatureSpace:
    network = extractor("auto")
    features = partial(pooled, network)
    return FeatureSpace(
        network.name,
        features,
        features(to_float(dataset.images(training[: MAX_TRAINING_IMAGES // 2])[0])),
        None,
    )


@dataclass(frozen=True)
class FidelityMetrics:
    """Computes the rows of an evaluation.

    A Fréchet distance is computed from up to `each` images of every category.
    """

    feature_space: FeatureSpace
    training: Tensor
    each: int

    def row(self, name: str, images: Tensor, labels: Tensor) -> FidelityRow:
        """Return the metrics of images (n, C, H, W) in [-1, 1] of requested categories (n,)."""
        neighbours = nearest(images, self.training)
        chosen = balanced(labels, self.each)
        space = self.feature_space
        enough = min(len(chosen), len(space.reference)) >= FEWEST
        accuracy = (
            float((space.classifier.predict(images)[0] == labels).double().mean())
            if space.classifier
            else None
        )
        return FidelityRow(
            name=name,
            n=len(images),
            category_accuracy=accuracy,
            interval=None if accuracy is None else wilson(accuracy, len(images)),
            frechet=frechet_distance(space.features(images[chosen]), space.reference)
            if enough
            else None,
            frechet_n=len(chosen),
            nearest=float(neighbours.first.mean()),
            copies=neighbours.copies,
            copies_interval=wilson(neighbours.copies, len(images)),
        )
