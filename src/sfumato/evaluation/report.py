"""The whole evaluation of a pipeline: fidelity, memorization, adherence and composition, as
figures, tables and images.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
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
from sfumato.evaluation.fidelity import Evaluation, compared, evaluate
from sfumato.evaluation.gallery import gallery
from sfumato.evaluation.memorization import Neighbours
from sfumato.generation.pipeline import Pipeline
from sfumato.observability.images import Alpha, grid_image, save_png
from sfumato.observability.tables import format_table

PAIRS = 10
Tell = Callable[[float, str], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationReport:
    """Everything that was measured.

    Attributes:
        fidelity: distances, copies and category accuracy, for each guidance scale and for held-out
            images.
        adherence: whether each context works.
        composition: by the name of a hold-out, figures of its combinations.
        guidance: scale at which contexts were judged.
        images: sheets by the name of their file.
    """

    fidelity: Evaluation
    adherence: Sequence[Adherence]
    composition: Mapping[str, Sequence[Composition]]
    guidance: float
    images: Mapping[str, Image.Image]

    def plain(self) -> dict[str, Any]:
        """Return all figures as plain data."""
        return {
            **self.fidelity.plain(),
            "adherence_guidance": self.guidance,
            "adherence": [asdict(row) for row in self.adherence],
            "composition": {
                name: [asdict(row) for row in rows] for name, rows in self.composition.items()
            },
        }

    def json(self) -> str:
        """Return all figures as JSON."""
        return json.dumps(self.plain(), indent=1)

    def table(self) -> str:
        """Format all figures as tables, with remarks."""
        parts = [
            fidelity_table(self.fidelity),
            *(f"note: {remark}" for remark in self.fidelity.remarks),
        ]
        if self.adherence:
            parts += [
                f"\ndoes the condition work? (guidance {self.guidance:g}; each context alone, on "
                "held-out ones; then all together)",
                adherence_table(list(self.adherence)),
            ]
        for name, rows in self.composition.items():
            if rows:
                parts += [
                    f"\ncombinations that were kept from training: {name}, {rows[0].prompts} "
                    "prompts"
                ]
                parts += [composition_table(list(rows))]
        return "\n".join(parts)

    def save(self, path: Path) -> None:
        """Write the figures to a JSON file, and the images into its folder."""
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
    on_progress: Tell = lambda fraction, text: None,
) -> EvaluationReport:
    """Compare samples with held-out images of the dataset that a pipeline was trained on.

    Args:
        num: images to generate for each guidance scale.
        guidance: scales to compare, by default 1 and the pipeline's own; contexts are judged at the
            largest.
        seed: seed of the generated images.
        on_progress: called with the fraction that is done, and what is being done.
    Raises:
        DataError: if too few images are held out.
    """
    compared(dataset)  # refuses what is too small before a classifier is trained
    scales = list(guidance) or sorted({1.0, pipeline.sampling.guidance})
    strongest, images = max(scales), dict[str, Image.Image]()
    classifier = (
        _classifier(dataset, _part(on_progress, 0.0, 0.1)) if len(dataset.categories) > 1 else None
    )

    def keep_pairs(scale: float, samples: Tensor, neighbours: Neighbours) -> None:
        images[f"nearest-guidance-{scale:g}.png"] = _pairs(
            dataset, samples, neighbours, pipeline.info.alpha
        )

    def keep_gallery(name: str, asked: Mapping[str, Any], samples: Tensor, real: Tensor) -> None:
        images[f"asked-by-{name}.png"] = gallery(asked, samples, real, info=pipeline.info)

    fidelity = evaluate(
        pipeline,
        dataset,
        num=num,
        guidances=scales,
        seed=seed,
        on_progress=_part(on_progress, 0.1, 0.5),
        reader=classifier,
        keep=keep_pairs,
    )
    adherence = measure_adherence(
        pipeline, dataset, classifier=classifier, num=num, seed=seed, guidance=strongest,
        on_progress=_part(on_progress, 0.5, 0.85), keep=keep_gallery,
    )  # fmt: skip
    on_progress(0.85, "combinations that were kept from training")
    composed = {
        name: _composed(pipeline, dataset, held, seed, strongest)
        for name, held in dataset.named_holdouts.items()
    }
    return EvaluationReport(
        fidelity=fidelity,
        adherence=adherence,
        composition=composed,
        guidance=strongest,
        images=images,
    )


def _classifier(dataset: Dataset, tell: Tell) -> Classifier:
    """Train the classifier of samples on the run's training images."""
    return train_classifier(
        dataset,
        dataset.with_common_shape(dataset.training),
        on_progress=lambda fraction: tell(fraction, "training a classifier on the real images"),
    )


def _part(tell: Tell, start: float, stop: float) -> Tell:
    """Return a progress callback for one measurement, which takes a part of the whole."""
    return lambda fraction, text: tell(start + (stop - start) * fraction, text)


def _composed(
    pipeline: Pipeline, dataset: Dataset, held: NDArray[Any], seed: int, guidance: float
) -> list[Composition]:
    """Return the figures of a hold-out's combinations.

    The list is empty unless the model reads text and at least two of the images have captions.
    """
    held = dataset.with_common_shape(held)
    captioned = held[[bool(dataset.entries[i].captions) for i in held]] if len(held) else held
    if part_of(pipeline.model.conditioner, Text) is None or len(captioned) < 2:
        return []
    return composition(pipeline, dataset, captioned, seed=seed, guidance=guidance)


def _pairs(dataset: Dataset, samples: Tensor, neighbours: Neighbours, alpha: Alpha) -> Image.Image:
    """Draw the samples closest to a training image, each above that image."""
    closest = neighbours.first.argsort()[:PAIRS]
    real = (
        to_float(
            dataset.images(
                dataset.with_common_shape(dataset.training)[neighbours.index[closest].numpy()]
            )[0]
        )
        + 1
    ) / 2
    both = torch.cat([samples[closest], real])
    return grid_image(
        both, columns=len(closest), row_labels=["sample", "nearest real"], alpha=alpha
    )


def fidelity_table(result: Evaluation) -> str:
    """Format the figures as a table, whose first row is that of real held-out images."""
    columns = (
        "",
        "n",
        "category accuracy",
        f"Fréchet (n={result.rows[0].frechet_n}, balanced)",
        "nearest training image",
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
        f"classifier trained on the run's real images: {accuracy:.1%} right on "
        f"{result.rows[0].n} held-out ones; "
        if accuracy is not None
        else "no categories, so that samples are not classified; "
    ) + (
        f"Fréchet distances to {result.reference} training images in the features of "
        f"{result.extractor}"
        f"{', which saw the others' if accuracy is not None else ''}; "
        f"nearest of {result.training} training images by distance in pixels"
    )
    return f"{head}\n{format_table([columns, *rows])}"
