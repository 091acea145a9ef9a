"""The fidelity of samples: they are compared with the dataset that the pipeline was trained on,
beside real held-out images and training images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato import randomness
from sfumato.contexts import enumerate_values
from sfumato.data import Dataset, to_float
from sfumato.data.choice import choose_evenly
from sfumato.data.copies import CopyIndex
from sfumato.evaluation.classifier import Classifier, select_labelled
from sfumato.evaluation.distances import FRECHET_IMAGES_PER_DIMENSION
from sfumato.evaluation.extractors import extractor
from sfumato.evaluation.figures import Figure
from sfumato.evaluation.memorization import CopyMeter, Memorization
from sfumato.evaluation.quality import QualityMeter, dimensions
from sfumato.evaluation.rows import Evaluation, FidelityRow, Reference
from sfumato.evaluation.sentences import describe, remarks_on
from sfumato.evaluation.statistics import ReferenceStatistics
from sfumato.generation.pipeline import Pipeline
from sfumato.generation.request import ResolvedRequest

HELD_OUT, TRAINING = "held-out real images", "training images"
# fractions of the progress bar
INDEX_FRACTION = 0.1
REFERENCE_FRACTION = 2 * INDEX_FRACTION


def choose_reference(dataset: Dataset, reads: Sequence[str]) -> Reference:
    """Return the images that samples of a model of this dataset are compared with.

    A model of categories makes no images without one; all others make images of the whole set.
    """
    parts = (dataset.with_common_shape(part) for part in (dataset.training, dataset.holdout))
    training, held_out = parts
    if "category" in reads:
        labelled = Reference(select_labelled(dataset, training), select_labelled(dataset, held_out))
        return labelled if len(labelled.training) else Reference(training, held_out)
    return Reference(training, held_out)


def evaluate(
    pipeline: Pipeline,
    dataset: Dataset,
    *,
    num: int = 500,
    guidances: Sequence[float] = (1.0,),
    seed: int = 1,
    features: str = "auto",
    statistics: ReferenceStatistics | None = None,
    classifier: Classifier | None = None,
    compared_with: str = "training",
    on_samples: Callable[[float, Tensor, Memorization], None] | None = None,
    on_progress: Callable[[float, str], None] = lambda fraction, text: None,
) -> Evaluation:
    """Generate `num` images for each guidance scale, and compare them with real ones.

    A model that is conditioned on nothing but categories samples each as often as the set has it;
    other models sample with the conditions of held-out images, or of training images where none is
    held out.

    Args:
        features: the network in whose features images are compared; see `extractors.extractor`.
        statistics: what the Fréchet distance compares with; by default the training images.
        classifier: of the categories, by which samples are read; without one they are not.
        compared_with: what the training images are called.
        on_samples: called with each scale, its images in [0, 1] and how near these are to training
            images.
        on_progress: called with the fraction that is done, and a description of the current part.
    """
    network = extractor(features)
    reference = choose_reference(dataset, pipeline.reads)
    on_progress(0.0, "comparing training images with one another")
    copies = CopyMeter(CopyIndex.of(dataset), features=network, name=compared_with)
    quality = QualityMeter(
        dataset,
        network,
        training=reference.training,
        held_out=reference.held_out,
        frechet=num >= FRECHET_IMAGES_PER_DIMENSION * dimensions(network),
        statistics=statistics,
        name=compared_with,
        on_progress=lambda part: on_progress(
            INDEX_FRACTION * (1 + part), "extracting features of the real images"
        ),
    )
    judge = _Judge(dataset, quality, copies, classifier if pipeline.reads else None)
    rows = judge.real_rows(reference, num, compared_with)
    conditions = choose_conditions(pipeline, dataset, reference, num)
    for number, guidance in enumerate(guidances):
        on_progress(
            REFERENCE_FRACTION + (1 - REFERENCE_FRACTION) * number / len(guidances),
            f"{num} samples at guidance {guidance:g}",
        )
        request = ResolvedRequest.of(conditions.context, pipeline.image_shape, num)
        images = pipeline.sample_request(request, seed=seed, guidance=guidance, batch_size=100)
        row = judge.row(f"samples, guidance {guidance:g}", images * 2 - 1, conditions.labels)
        rows.append(row)
        if on_samples is not None:
            on_samples(guidance, images, row.memorization)
    on_progress(1.0, "done")
    own = _row_at(rows, guidances, pipeline.sampling.guidance)
    return Evaluation(
        extractor=network.name,
        copy_rule=copies.rule,
        rows=rows,
        left_out=copies.left_out,
        sentences=describe(own, rows[0], copies.left_out, compared_with),
        remarks=[
            *conditions.remarks,
            *remarks_on(dataset, reference, quality, rows, compared_with),
        ],
        compared_with=compared_with,
        statistics=quality.statistics if any(_has_frechet(row) for row in rows) else None,
    )


def _has_frechet(row: FidelityRow) -> bool:
    return row.quality is not None and row.quality.frechet is not None


def _row_at(rows: Sequence[FidelityRow], guidances: Sequence[float], default: float) -> FidelityRow:
    """Return the row of samples at the model's own guidance, or else of the last scale."""
    samples = list(rows)[-len(guidances) :]
    scales = list(guidances)
    return samples[scales.index(default) if default in scales else -1]


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The conditions of samples.

    Attributes:
        context: the conditions that the model reads, batched.
        labels: category of each sample, or -1; None without conditions on categories.
        remarks: sentences on where they come from.
    """

    context: dict[str, Any]
    labels: Tensor | None
    remarks: Sequence[str] = ()


def choose_conditions(
    pipeline: Pipeline, dataset: Dataset, reference: Reference, num: int
) -> Conditions:
    """Return the conditions of `num` samples.

    Values that can be listed, such as categories, are those of training images, so that each is
    sampled as often as the set has it.
    """
    if not pipeline.reads:
        return Conditions(context={}, labels=None)
    listed = enumerate_values(pipeline.reads, num, pipeline.info)
    labels = dataset.labels[torch.from_numpy(reference.training)]
    if listed is not None and not bool((labels >= 0).any()):
        return Conditions(context=listed, labels=None)
    if listed is not None:
        ordered = reference.training[labels.argsort(stable=True).numpy()]
        # each category in proportion, in an order that has nothing to do with it
        spread = ordered[((np.arange(num) + 0.5) * len(ordered) / num).astype(np.int64)]
        positions = spread[randomness.permutation(0, "conditions", index=0, size=num)]
        context = dataset.context(positions)
        return Conditions(
            context={name: context[name] for name in pipeline.reads},
            labels=dataset.labels[torch.from_numpy(positions)],
        )
    remarks = []
    source = reference.held_out
    if not len(source):
        source = reference.training
        remarks.append("no image is held out, so the conditions are those of training images")
    pixels, _, positions = dataset.images(np.resize(choose_evenly(source, num), num))
    context = pipeline.model.conditioner.training_context(
        to_float(pixels), dataset.context(positions), seed=0, first=0
    )
    return Conditions(
        context={name: value for name, value in context.items() if name in pipeline.reads},
        labels=dataset.labels[torch.from_numpy(positions)],
        remarks=remarks,
    )


@dataclass(frozen=True)
class _Judge:
    """Computes rows of figures."""

    dataset: Dataset
    quality: QualityMeter
    copies: CopyMeter
    classifier: Classifier | None

    def real_rows(self, reference: Reference, num: int, name: str) -> list[FidelityRow]:
        """Return the rows of held-out images and of up to `num` training images."""
        held_out = self._images(reference.held_out)
        order = randomness.permutation(0, "evaluation-row", index=0, size=len(reference.training))
        learned = reference.training[order][:num]
        labels = self.dataset.labels
        return [
            FidelityRow(
                name=HELD_OUT,
                n=len(held_out),
                quality=self.quality.measure_held_out() if len(held_out) else None,
                memorization=self.copies.measure(held_out),
                category_accuracy=self._accuracy(
                    held_out, labels[torch.from_numpy(reference.held_out)]
                ),
            ),
            self.row(
                TRAINING if name == "training" else f"{name} images",
                self._images(learned),
                labels[torch.from_numpy(learned)],
            ),
        ]

    def row(self, name: str, images: Tensor, labels: Tensor | None) -> FidelityRow:
        """Return the figures of images (n, C, H, W) in [-1, 1] of requested categories (n,)."""
        return FidelityRow(
            name=name,
            n=len(images),
            quality=self.quality.measure(images),
            memorization=self.copies.measure(images),
            category_accuracy=self._accuracy(images, labels),
        )

    def _images(self, positions: NDArray[np.int64]) -> Tensor:
        if not len(positions):
            return torch.zeros(0, *self.dataset.image_shape)
        return to_float(self.dataset.images(positions).pixels)

    def _accuracy(self, images: Tensor, labels: Tensor | None) -> Figure | None:
        """Return how many images with a category the classifier reads as theirs."""
        if self.classifier is None or labels is None or not bool((labels >= 0).any()):
            return None
        known = labels >= 0
        read = self.classifier.predict(images[known].nan_to_num(0.0))[0]
        return Figure.proportion(
            (read == labels[known]).numpy(),
            metric="classified as the requested category",
            extractor=self.classifier.name,
            reference=f"{len(self.dataset.categories)} categories",
        )
