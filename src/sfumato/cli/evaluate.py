"""sfumato evaluate."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from sfumato.data import Dataset
    from sfumato.evaluation import Composition, Evaluation
    from sfumato.evaluation.classifier import Classifier
    from sfumato.generation.pipeline import Pipeline
    from sfumato.observability.images import Alpha
    from sfumato.observability.progress import ProgressBar

PAIRS = 10


def evaluate(
    run: Annotated[Path, typer.Argument(help="Directory of the run.")],
    num: Annotated[int, typer.Option(min=2, help="Images to generate for each guidance scale.")] = 500,
    guidance: Annotated[
        list[float] | None,
        typer.Option(help="Scales to compare, by default 1 and the run's own; contexts are judged at the largest."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the generated images.")] = 1,
    precision: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Inside the network.")] = "float32",
    compile: Annotated[bool, typer.Option("--compile", help="Compile the network first: pays for many images.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file; by default RUN/evaluation/evaluation.json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the file holds instead of tables.")] = False,
) -> None:
    """Compare samples with real held-out images: distance, copies, categories as a classifier reads them, and whether contexts work."""
    from sfumato.data.changes import changes
    from sfumato.evaluation import adherence_table, composition_table, gallery, measure_adherence
    from sfumato.evaluation import evaluate as measure
    from sfumato.evaluation.fidelity import compared
    from sfumato.generation.request import require_context
    from sfumato.observability.images import save_png
    from sfumato.observability.progress import ProgressBar
    from sfumato.recipes import resolve
    from sfumato.runs import load
    from sfumato.runs.preparation import open_data
    from sfumato.storage.output_paths import require_writable
    from sfumato.storage.run_directory import RunDirectory

    target = out or run / "evaluation" / "evaluation.json"
    directory = RunDirectory.existing(run)
    require_writable(target.parent, target)
    pipeline = load(run, precision=precision)
    if compile:
        pipeline.compile()
    if not pipeline.reads:
        for scale in guidance or ():
            require_context(scale, {})
    dataset = open_data(resolve(run))
    changed = changes(directory.data_record(), dataset)
    compared(dataset)  # refuses what is too small before a classifier is trained
    scales = guidance or sorted({1.0, pipeline.sampling.guidance})
    strongest = max(scales)
    target.parent.mkdir(parents=True, exist_ok=True)
    with ProgressBar("evaluating") as bar:
        reader = _reader(dataset, bar) if len(dataset.categories) > 1 else None
        result = measure(
            pipeline, dataset, num=num, guidances=scales, seed=seed, on_progress=_share(bar, 0.1, 0.5), reader=reader,
            keep=lambda scale, images, neighbours: _draw_pairs(dataset, scale, images, neighbours, target.parent, pipeline.facts.alpha),
        )  # fmt: skip
        adherence = measure_adherence(
            pipeline, dataset, classifier=reader, num=num, seed=seed, guidance=strongest, on_progress=_share(bar, 0.5, 0.85),
            keep=lambda name, asked, samples, real: save_png(
                gallery(asked, samples, real, facts=pipeline.facts),
                target.parent / f"asked-by-{name}.png",
            ),
        )  # fmt: skip
        bar.update(0.85, "combinations that were kept from training")
        composed = {name: _composed(pipeline, dataset, held, seed, strongest) for name, held in dataset.named_holdouts.items()}
    figures = {
        **result.plain(),
        "adherence_guidance": strongest,
        "adherence": [asdict(row) for row in adherence],
        "composition": {name: [asdict(row) for row in rows] for name, rows in composed.items()},
    }
    target.write_text(json.dumps(figures, indent=1))
    if as_json:
        typer.echo(target.read_text())
        return
    typer.echo(table(result))
    since = [f"the data are not what this run was trained on: {'; '.join(changed)}"] if changed else []
    for remark in (*since, *result.remarks):
        typer.echo(f"note: {remark}")
    if adherence:
        typer.echo(
            f"\ndoes the condition work? (guidance {strongest:g}; each context alone, on held-out ones; then all together)"
        )
        typer.echo(adherence_table(adherence))
        typer.echo(f"what was asked for, what came, and the real images: {target.parent}/asked-by-*.png")
    for name, rows in composed.items():
        if rows:
            typer.echo(f"\ncombinations that were kept from training: {name}, {rows[0].prompts} prompts")
            typer.echo(composition_table(rows))
    typer.echo(f"figures: {target}")
    typer.echo(f"samples above their nearest training images: {target.parent}/nearest-guidance-*.png")


def _reader(dataset: Dataset, bar: ProgressBar) -> Classifier:
    """The classifier that reads samples, trained on the run's training images."""
    from sfumato.evaluation.classifier import train_classifier

    tell = _share(bar, 0.0, 0.1)
    return train_classifier(
        dataset,
        dataset.usual(dataset.training),
        on_progress=lambda share: tell(share, "training a classifier on the real images"),
    )


def _share(bar: ProgressBar, start: float, stop: float) -> Callable[[float, str], None]:
    """Progress of one measurement, as a share of all."""
    return lambda fraction, text: bar.update(start + (stop - start) * fraction, text)


def _composed(pipeline: Pipeline, dataset: Dataset, held: NDArray[np.int64], seed: int, guidance: float) -> list[Composition]:
    """Figures of a hold-out's combinations, for a model that reads text and a hold-out that has some."""
    from sfumato.contexts import Text, part_of
    from sfumato.evaluation import composition

    held = dataset.usual(held)
    captioned = held[[bool(dataset.entries[i].captions) for i in held]] if len(held) else held
    if part_of(pipeline.model.conditioner, Text) is None or len(captioned) < 2:
        return []
    return composition(pipeline, dataset, captioned, seed=seed, guidance=guidance)


def _draw_pairs(dataset, scale: float, images: Tensor, neighbours, folder: Path, alpha: Alpha) -> None:
    """The samples closest to a training image, each above that image."""
    import torch

    from sfumato.data import to_float
    from sfumato.observability.images import grid_image, save_png

    closest = neighbours.first.argsort()[:PAIRS]
    real = (to_float(dataset.images(dataset.usual(dataset.training)[neighbours.index[closest].numpy()])[0]) + 1) / 2
    both = torch.cat([images[closest], real])
    sheet = grid_image(both, columns=len(closest), row_labels=["sample", "nearest real"], alpha=alpha)
    save_png(sheet, folder / f"nearest-guidance-{scale:g}.png")


def table(result: Evaluation) -> str:
    """The figures for a person, each row beside real held-out images."""
    from sfumato.observability.tables import format_table

    columns = (
        "",
        "n",
        "read as asked",
        f"Fréchet (n={result.rows[0].frechet_n}, balanced)",
        "nearest training image",
        "copies",
    )
    rows = [
        (
            row.name, str(row.n), f"{row.read_as_asked:.1%} [{row.interval[0]:.1%}, {row.interval[1]:.1%}]" if row.interval else "-",
            "-" if row.frechet is None else f"{row.frechet:.2f}", f"{row.nearest:.2f}",
            f"{row.copies:.1%} [{row.copies_interval[0]:.1%}, {row.copies_interval[1]:.1%}]",
        )
        for row in result.rows
    ]  # fmt: skip
    accuracy = result.classifier_accuracy
    head = (
        f"classifier trained on the run's real images: {accuracy:.1%} right on {result.rows[0].n} held-out ones; "
        if accuracy is not None
        else "no categories, so that samples are not read by a classifier; "
    ) + (
        f"Fréchet distances to {result.reference} training images in the features of {result.extractor}"
        f"{', which saw the others' if accuracy is not None else ''}; "
        f"nearest of {result.training} training images by distance in pixels"
    )
    return f"{head}\n{format_table([columns, *rows])}"
