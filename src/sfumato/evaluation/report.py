"""The complete evaluation of a pipeline: fidelity, memorization, adherence and composition, as
metrics, tables and images.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sfumato.contexts import Text, part_of
from sfumato.data import Dataset, to_float
from sfumato.evaluation.adherence import Adherence, adherence_table, measure_adherence
from sfumato.evaluation.classifier import Classifier, train_classifier
from sfumato.evaluation.composition import Composition, composition, composition_table
from sfumato.evaluation.fidelity import Evaluation, evaluate, evaluation_split
from sfumato.evaluation.gallery import gallery
from sfumato.evaluation.memorization import Neighbours
from sfumato.generation.pipeline import Pipeline
from sfumato.observability.images import Alpha, grid_image, save_png
from sfumato.observability.tables import format_table

NUM_PAIRS = 10  # of samples with their nearest training images
ProgressCallback = Callable[[float, str], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationReport:
    """All metrics of a pipeline.

    Attributes:
        fidelity: distances, copies and category accuracy, for each guidance scale and for held-out
            images.
        adherence: whether samples follow each context.
        composition: metrics of the combinations of each named hold-out.
        guidance: guidance scale of adherence and composition.
        images: sheets of images by file name.
    """

    fidelity: Evaluation
    adherence: Sequence[Adherence]
    composition: Mapping[str, Sequence[Composition]]
    guidance: float
    images: Mapping[str, Image.Image]

    def plain(self) -> dict[str, Any]:
        """Return all metrics as plain data."""
        return {
            **self.fidelity.plain(),
            "adherence_guidance": self.guidance,
            "adherence": [asdict(row) for row in self.adherence],
            "composition": {
                name: [asdict(row) for row in rows] for name, rows in self.composition.items()
            },
        }

    def against(self, name: str) -> EvaluationReport:
        """Return the report of images that were compared with others than the training images."""
        return replace(self, fidelity=replace(self.fidelity, compared_with=name))

    def json(self) -> str:
        """Return all metrics as JSON."""
        return json.dumps(self.plain(), indent=1)

    def table(self) -> str:
        """Format all metrics as tables, with remarks."""
        parts = [
            fidelity_table(self.fidelity),
            *(f"note: {remark}" for remark in self.fidelity.remarks),
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
        """Write the metrics to a JSON file, and the images into its folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        for name, image in self.images.items():
            save_png(image, path.parent / name)
        path.write_text(self.json())


def evaluate_pipeline(
    pipeline: Pipeline,
    dataset: Dataset,
    *,
    num: int = 500,
    guidance: Sequence[float] = (),
    seed: int = 1,
    on_progress: ProgressCallback = lambda fraction, text: None,
) -> EvaluationReport:
    """Compare samples with held-out images of the dataset that a pipeline was trained on.

    Args:
        num: images to generate for each guidance scale.
        guidance: scales to compare, by default 1 and the pipeline's default; adherence and
            composition are measured at the largest.
        seed: seed of the generated images.
        on_progress: called with the fraction that is done, and a description of the current part.
    Raises:
        DataError: if too few images are held out.
    """
    evaluation_split(dataset)  # refuses a small dataset before a classifier is trained
    scales = list(guidance) or sorted({1.0, pipeline.sampling.guidance})
    strongest, images = max(scales), dict[str, Image.Image]()
    classifier = (
        _classifier(dataset, _part(on_progress, 0.0, 0.1)) if len(dataset.categories) > 1 else None
    )

    def draw_pairs(scale: float, samples: Tensor, neighbours: Neighbours) -> None:
        images[f"nearest-guidance-{scale:g}.png"] = _pairs(
            dataset, samples, neighbours, pipeline.info.alpha
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
        images=images,
    )


def _classifier(dataset: Dataset, report: ProgressCallback) -> Classifier:
    """Train the classifier of samples on the run's training images."""
    return train_classifier(
        dataset,
        dataset.with_common_shape(dataset.training),
        on_progress=lambda fraction: report(fraction, "training a classifier on the real images"),
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
        positions[[bool(dataset.entries[i].captions) for i in positions]]
        if len(positions)
        else positions
    )
    if part_of(pipeline.model.conditioner, Text) is None or len(captioned) < 2:
        return []
    return composition(pipeline, dataset, captioned, seed=seed, guidance=guidance)


def _pairs(dataset: Dataset, samples: Tensor, neighbours: Neighbours, alpha: Alpha) -> Image.Image:
    """Draw the samples closest to a training image, each above that image."""
    closest = neighbours.first.argsort()[:NUM_PAIRS]
    real = (
        to_float(
            dataset.images(evaluation_split(dataset).training[neighbours.index[closest].numpy()])[0]
        )
        + 1
    ) / 2
    both = torch.cat([samples[closest], real])
    return grid_image(
        both, columns=len(closest), row_labels=["sample", "nearest real"], alpha=alpha
    )


def fidelity_table(result: Evaluation) -> str:
    """Format fidelity as a table, whose first row is that of real held-out images."""
    columns = (
        "",
        "n",
        "category accuracy",
        f"Fréchet (n={result.rows[0].frechet_n}, balanced)",
        f"nearest {result.compared_with} image",
        "copies",
    )
    rows = [
        (
            row.name,
            str(row.n),
            f"{row.category_accuracy:.1%} [{row.interval[0]:.1%}, {row.interval[1]:.1%}]"
            if row.interval
            else "-",
            "-" if row.frechet is None else f"{row.frechet:.2f}",
            f"{row.nearest:.2f}",
            f"{row.copies:.1%} [{row.copies_interval[0]:.1%}, {row.copies_interval[1]:.1%}]",
        )
        for row in result.rows
    ]
    accuracy = result.classifier_accuracy
    head = (
        f"classifier trained on the run's real images: accuracy {accuracy:.1%} on "
        f"{result.rows[0].n} held-out images; "
        if accuracy is not None
        else "no categories, so samples are not classified; "
    ) + (
        f"Fréchet distance to {result.reference} {result.compared_with} images, features of "
        f"{result.extractor}"
        f"{', trained on the other half of the training set' if accuracy is not None else ''}; "
        f"nearest of {result.training} {result.compared_with} images by distance in pixels"
    )
    return f"{head}\n{format_table([columns, *rows])}"
