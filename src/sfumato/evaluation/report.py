"""One evaluation of a pipeline against the data it was trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato import randomness
from sfumato.asking import Request
from sfumato.data import Dataset, to_float
from sfumato.errors import DataError
from sfumato.evaluation.adherence import wilson
from sfumato.evaluation.classifier import Classifier, train_classifier
from sfumato.evaluation.frechet import frechet_distance
from sfumato.evaluation.memorization import Neighbours, nearest
from sfumato.pipeline import Pipeline

LARGEST_TRAINING = 20_000  # pictures that distances are taken to


@dataclass(frozen=True, kw_only=True)
class Row:
    """Figures of one set of pictures: samples at a guidance scale, or the held-out pictures.

    Attributes:
        read_as_asked: share that the classifier reads as the category asked for, with its 95 % interval (Wilson).
        frechet: distance to one half of the training pictures in features of a classifier trained on the other half, taken with
            `frechet_n` pictures, as many of each category, so that rows compare: category counts and n move it.
        nearest: mean L2 distance to the nearest training picture; copies: share with d1/d2 < 1/3.
    """

    name: str
    n: int
    read_as_asked: float
    interval: tuple[float, float]
    frechet: float
    frechet_n: int
    nearest: float
    copies: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Rows of figures; the first is held-out real pictures, what a perfect model would get."""

    extractor: str
    reference: int
    classifier_accuracy: float
    training: int
    rows: Sequence[Row]

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def balanced(labels: Tensor, each: int) -> Tensor:
    """Positions of the first `each` pictures of every category, or of as many as there are."""
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
    """Generate `num` pictures for each guidance scale, and compare them with real ones.

    A model that is steered by nothing but categories is asked for each in turn; others for what held-out pictures are.

    Args:
        reader: what samples are read with; trained on the training pictures unless given.
        keep: handed each scale's pictures in [0, 1] and their nearest training pictures.
    Raises:
        DataError: if the data have no categories to be read, or fewer than two pictures are held out.
    """
    if len(dataset.categories) < 2:
        raise DataError(
            "has no categories, which this evaluation reads samples by",
            where="evaluate",
            mend="sort the pictures into sub-folders",
        )
    trained_on, holdout = dataset.usual(dataset.training), dataset.usual(dataset.holdout)
    if len(holdout) < 2:
        raise DataError(
            f"{len(holdout)} picture is held out, too few to compare samples with",
            where="evaluate",
            mend="add pictures, or raise data.holdout in a new run",
        )
    tell = on_progress or (lambda fraction, text: None)
    tell(0.0, "training a classifier on the real pictures")
    reader = reader or train_classifier(dataset, trained_on)
    # Features of pictures that a classifier was trained on are not like those of pictures it has not seen. So the features come from
    # one trained on half of the training pictures, and the reference is the other half: as new to it as the hold-out and the samples.
    order = randomness.permutation(0, "evaluation", index=0, size=len(trained_on))
    seen, reference = (trained_on[part][:LARGEST_TRAINING] for part in np.array_split(order, 2))
    extractor = train_classifier(dataset, seen)
    training = to_float(dataset.images(trained_on[:LARGEST_TRAINING])[0])
    held_out = to_float(dataset.images(holdout)[0])
    labels = dataset.context(reference)["category"]
    reference = reference[balanced(labels, int(torch.bincount(labels).min())).numpy()]
    features = extractor.read(to_float(dataset.images(reference)[0]))[1]
    each = int(torch.bincount(dataset.context(holdout)["category"], minlength=len(dataset.categories)).min())
    judge = _Judge(reader, extractor, training, features, max(1, min(each, num // len(dataset.categories))))

    rows = [judge.row("held-out real pictures", held_out, dataset.context(holdout)["category"])]
    context = _asked(pipeline, dataset, holdout, num)
    asked = context["category"]
    read = {name: value for name, value in context.items() if name in pipeline.reads}
    for number, guidance in enumerate(guidances):
        tell((number + 0.5) / (len(guidances) + 0.5), f"{num} samples at guidance {guidance:g}")
        request = Request.of(read, pipeline.image_shape, num)
        images = pipeline.sample(num, request=request, seed=seed, guidance=guidance, batch_size=100)
        rows.append(judge.row(f"samples, guidance {guidance:g}", images * 2 - 1, asked))
        if keep is not None:
            keep(guidance, images, nearest(images * 2 - 1, training))
    tell(1.0, "done")
    return Evaluation(
        extractor=extractor.name,
        reference=len(reference),
        classifier_accuracy=reader.held_out_accuracy,
        training=len(training),
        rows=rows,
    )


def _asked(pipeline: Pipeline, dataset: Dataset, holdout: NDArray[np.int64], num: int) -> dict[str, Any]:
    """What `num` samples are asked for: each category in turn, or what held-out pictures are; "category" is always among it."""
    if pipeline.reads in ((), ("category",)):
        return {"category": torch.arange(num) % len(dataset.categories)}
    chosen = np.resize(holdout, num)
    pixels, _, chosen = dataset.images(chosen)
    return pipeline.model.conditioner.derive(to_float(pixels), dataset.context(chosen), seed=0, first=0)


@dataclass(frozen=True)
class _Judge:
    reader: Classifier
    extractor: Classifier
    training: Tensor
    features: Tensor
    each: int

    def row(self, name: str, images: Tensor, asked: Tensor) -> Row:
        read, features = self.reader.read(images)[0], self.extractor.read(images)[1]
        neighbours = nearest(images, self.training)
        chosen = balanced(asked, self.each)
        right = float((read == asked).double().mean())
        return Row(
            name=name,
            n=len(images),
            read_as_asked=right,
            interval=wilson(right, len(images)),
            frechet=frechet_distance(features[chosen], self.features),
            frechet_n=len(chosen),
            nearest=float(neighbours.first.mean()),
            copies=neighbours.copies,
        )
