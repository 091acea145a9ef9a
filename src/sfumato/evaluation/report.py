"""The complete evaluation of a pipeline: fidelity, memorization, adherence and composition, as
metrics, tables and images.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sfumato.contexts import Text, part_of
from sfumato.data import Dataset, to_float
from sfumato.data.copies import NO_COPY
from sfumato.evaluation.adherence import Adherence, adherence_table, measure_adherence
from sfumato.evaluation.classifier import Classifier, select_labelled, train_classifier
from sfumato.evaluation.composition import Composition, composition, composition_table
from sfumato.evaluation.fidelity import evaluate
from sfumato.evaluation.figures import Figure, percent, wilson
from sfumato.evaluation.gallery import gallery
from sfumato.evaluation.memorization import Memorization
from sfumato.evaluation.rows import Evaluation, FidelityRow
from sfumato.evaluation.statistics import ReferenceStatistics
from sfumato.generation.pipeline import Pipeline
from sfumato.observability.images import Alpha, grid_image, save_png
from sfumato.observability.tables import format_table
from sfumato.storage.atomic import write_text

STATISTICS = "statistics.npz"  # of the reference of the Fréchet distance
NUM_PAIRS = 10  # of samples with their nearest training images
ProgressCallback = Callable[[float, str], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationReport:
    """All metrics of a pipeline.

    Attributes:
        fidelity: distances, copies and category accuracy, for real images and each guidance scale.
        adherence: whether samples follow each context.
        composition: metrics of the combinations of each named hold-out.
        guidance: guidance scale of adherence and composition.
        classifier: accuracy of the classifier of categories on held-out images; None without one.
        images: sheets of images by file name.
    """

    fidelity: Evaluation
    adherence: Sequence[Adherence]
    composition: Mapping[str, Sequence[Composition]]
    guidance: float
    classifier: Figure | None
    images: Mapping[str, Image.Image]

    def plain(self) -> dict[str, Any]:
        """Return all metrics as plain data."""
        return {
            **self.fidelity.plain(),
            "classifier": None if self.classifier is None else self.classifier.plain(),
            "adherence_guidance": self.guidance,
            "adherence": [row.plain() for row in self.adherence],
            "composition": {
                name: [row.plain() for row in rows] for name, rows in self.composition.items()
            },
        }

    def json(self) -> str:
        """Return all metrics as JSON."""
        return json.dumps(self.plain(), indent=1)

    def table(self) -> str:
        """Format all metrics as tables, with remarks."""
        classified = (
            []
            if self.classifier is None
            else [
                "classifier trained on the real images: accuracy "
                f"{self.classifier.text(percent)} on {self.classifier.n} held-out images"
            ]
        )
        parts = [
            fidelity_table(self.fidelity),
            *classified,
            *(f"note: {remark}" for remark in self.fidelity.remarks),
            *self.fidelity.sentences,
        ]
        if self.adherence:
            parts += [
                f"\nadherence to the condition (guidance {self.guidance:g}; contexts of held-out images, "
                "each alone, then all together)",
                adherence_table(list(self.adherence)),
            ]
        for name, rows in self.composition.items():
            if rows:
                parts += [
                    f"\ncombinations excluded from training: {name}, {rows[0].prompts} prompts"
                ]
                parts += [composition_table(list(rows))]
        return "\n".join(parts)

    def save(self, path: Path) -> None:
        """Write the metrics to a JSON file, and images and reference statistics into its folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        for name, image in self.images.items():
            save_png(image, path.parent / name)
        if self.fidelity.statistics is not None:
            self.fidelity.statistics.save(path.parent / STATISTICS)
        write_text(path, self.json())


def evaluate_pipeline(
    pipeline: Pipeline,
    dataset: Dataset,
    *,
    num: int = 500,
    guidance: Sequence[float] = (),
    seed: int = 1,
    features: str = "auto",
    statistics: ReferenceStatistics | None = None,
    compared_with: str = "training",
    on_progress: ProgressCallback = lambda fraction, text: None,
) -> EvaluationReport:
    """Compare samples with held-out images of the dataset that a pipeline was trained on.

    Args:
        num: images to generate for each guidance scale.
        guidance: scales to compare, by default 1 and the pipeline's default; adherence and
            composition are measured at the largest.
        seed: seed of the generated images.
        features: the network in whose features images are compared; see `extractors.extractor`.
        statistics: what the Fréchet distance compares with; by default the training images.
        compared_with: what the images that the dataset trains on are called.
        on_progress: called with the fraction that is done, and a description of the current part.
    """
    scales = list(guidance) or sorted({1.0, pipeline.sampling.guidance})
    if not pipeline.reads:  # there is nothing to guide
        scales = scales[:1]
    strongest, images = max(scales), dict[str, Image.Image]()
    classifier = category_classifier(pipeline, dataset, _part(on_progress, 0.0, 0.1))

    def draw_pairs(scale: float, samples: Tensor, memorization: Memorization) -> None:
        images[f"nearest-guidance-{scale:g}.png"] = _pairs(
            dataset, samples, memorization, pipeline.info.alpha
        )

    def draw_gallery(
        name: str, condition: Mapping[str, Any], samples: Tensor, real: Tensor
    ) -> None:
        images[f"asked-by-{name}.png"] = gallery(condition, samples, real, info=pipeline.info)

    fidelity = evaluate(
        pipeline,
        dataset,
        num=num,
        guidances=scales,
        seed=seed,
        features=features,
        statistics=statistics,
        compared_with=compared_with,
        on_progress=_part(on_progress, 0.1, 0.5),
        classifier=classifier,
        on_samples=draw_pairs,
    )
    adherence = measure_adherence(
        pipeline, dataset, classifier=classifier, num=num, seed=seed, guidance=strongest,
        on_progress=_part(on_progress, 0.5, 0.85), on_samples=draw_gallery,
    )  # fmt: skip
    on_progress(0.85, "combinations excluded from training")
    composed = {
        name: _composition(pipeline, dataset, positions, seed, strongest)
        for name, positions in dataset.named_holdouts.items()
    }
    return EvaluationReport(
        fidelity=fidelity,
        adherence=adherence,
        composition=composed,
        guidance=strongest,
        classifier=_accuracy(classifier, dataset),
        images=images,
    )


def category_classifier(
    pipeline: Pipeline, dataset: Dataset, report: ProgressCallback
) -> Classifier | None:
    """Train the classifier of samples on the run's training images.

    There is none for a model without conditions, nor for images of fewer than two categories.
    """
    training = select_labelled(dataset, dataset.with_common_shape(dataset.training))
    if not pipeline.reads or len(dataset.labels[torch.from_numpy(training)].unique()) < 2:
        return None
    return train_classifier(
        dataset,
        training,
        on_progress=lambda fraction: report(fraction, "training a classifier on the real images"),
    )


def _accuracy(classifier: Classifier | None, dataset: Dataset) -> Figure | None:
    """Return the accuracy of the classifier on held-out images with a category."""
    held_out = select_labelled(dataset, dataset.with_common_shape(dataset.holdout))
    if classifier is None or not len(held_out):
        return None
    low, high = wilson(classifier.held_out_accuracy, len(held_out))
    return Figure(
        value=classifier.held_out_accuracy,
        low=low,
        high=high,
        n=len(held_out),
        metric="accuracy of the classifier on held-out images",
        extractor=classifier.name,
        reference=f"{len(dataset.categories)} categories",
    )


def _part(report: ProgressCallback, start: float, stop: float) -> ProgressCallback:
    """Return a progress callback for a part of the evaluation, from `start` to `stop`."""
    return lambda fraction, text: report(start + (stop - start) * fraction, text)


def _composition(
    pipeline: Pipeline, dataset: Dataset, positions: NDArray[Any], seed: int, guidance: float
) -> list[Composition]:
    """Return the composition metrics of a named hold-out.

    The list is empty unless the model reads text and at least two of the images have captions.
    """
    positions = dataset.with_common_shape(positions)
    captioned = (
        positions[[bool(captions) for captions in dataset.captions(positions)]]
        if len(positions)
        else positions
    )
    if part_of(pipeline.model.conditioner, Text) is None or len(captioned) < 2:
        return []
    return composition(pipeline, dataset, captioned, seed=seed, guidance=guidance)


def _pairs(
    dataset: Dataset, samples: Tensor, memorization: Memorization, alpha: Alpha
) -> Image.Image:
    """Draw the samples closest to a training image, each above that image, resized to its size.

    Copies come first.
    """
    neighbours, copied = memorization.neighbours, memorization.copied
    order = np.lexsort((neighbours.first, copied == NO_COPY))[:NUM_PAIRS]
    positions = np.where(copied == NO_COPY, neighbours.positions, copied)[order]
    real = [(to_float(dataset.images([position]).pixels) + 1) / 2 for position in positions]
    size = samples.shape[2:]
    fitted = [
        image if image.shape[2:] == size else F.interpolate(image, size=size, mode="nearest")
        for image in real
    ]
    both = torch.cat([samples[torch.from_numpy(order)], *fitted])
    return grid_image(both, columns=len(order), row_labels=["sample", "nearest real"], alpha=alpha)


def fidelity_table(result: Evaluation) -> str:
    """Format fidelity as a table: real held-out images, training images, then samples."""
    shown = [
        (title, write, figure)
        for title, write, figure in _columns(result.compared_with)
        if any(row.figures().get(figure) for row in result.rows)
    ]
    head = ("", "n", *(title for title, _, _ in shown))
    rows = [
        (row.name, str(row.n), *(_cell(row, name, write) for _, write, name in shown))
        for row in result.rows
    ]
    name = result.compared_with
    n = result.left_out.copies.n if result.left_out.copies else 0
    about = [
        f'features of {result.extractor}; 95 % intervals in brackets; "-": too few images',
        f"copies: {result.copy_rule}",
        f"close: nearer to a {name} image than 99 % of unseen images, by means of 8 x 8 / by "
        f"feature maps; judged by {n} {name} images that are left out in turn",
    ]
    return "\n".join([format_table([head, *rows]), *about])


def _columns(name: str) -> list[tuple[str, Callable[[float], str], str]]:
    """Return the title of each column, how its values are written, and which figure it shows."""
    return [
        ("KID to held-out", _kernel, "kid_held_out"),
        (f"KID to {name}", _kernel, "kid_training"),
        ("good", _whole_percent, "good"),
        ("variety", _whole_percent, "variety"),
        ("FID", lambda value: f"{value:.2f}", "frechet"),
        ("category accuracy", percent, "category_accuracy"),
        ("copies", percent, "copies"),
        ("close", percent, "close"),
        ("nearest", lambda value: f"{value:.2f}", "nearest"),
        ("authentic", _whole_percent, "authentic"),
        ("C_T", lambda value: f"{value:+.1f}", "distance_test"),
    ]


WITHOUT_INTERVAL = ("nearest", "authentic", "distance_test")  # in the table


def _cell(row: FidelityRow, name: str, write: Callable[[float], str]) -> str:
    figures = row.figures()
    figure = figures.get(name)
    if figure is None:
        return "-"
    if name == "close":
        maps = figures["close_in_features"]
        return write(figure.value) + ("" if maps is None else f" / {write(maps.value)}")
    return write(figure.value) if name in WITHOUT_INTERVAL else figure.text(write)


def _kernel(value: float) -> str:
    return f"{value:+.3f}" if abs(value) >= 0.1 else f"{value:+.4f}"


def _whole_percent(value: float) -> str:
    return f"{value:.0%}"
