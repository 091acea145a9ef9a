"""README.md of an exported model: what it is, how to run it, what was measured and what was not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfumato.config import kind_of
from sfumato.foreign_models import PIPELINE
from sfumato.interop.base_folder import base_of, license_of
from sfumato.interop.trained_model import TrainedModel
from sfumato.sampling import sampler_name

NAME, SAMPLES = "README.md", "samples.png"
EVALUATION = "evaluation/evaluation.json"  # in a run's directory
EVALUATION_COLUMNS = (
    ("kernel distance (KID) to held-out images", "kid_held_out"),
    ("kernel distance to training images", "kid_training"),
    ("share that looks real", "good"),
    ("variety", "variety"),
    ("category accuracy", "category_accuracy"),
)
VERDICT, REPORT = "best/verdict.json", "finetuning/report.json"
UNKNOWN = "unknown"
NOT_MEASURED = "not measured"


def write_card(
    model: TrainedModel,
    folder: Path,
    how_to_run: str,
    *,
    name: str = NAME,
    samples: str = SAMPLES,
) -> None:
    """Write README.md and, if the run has drawn samples, samples.png into a model's folder.

    Nothing is generated or measured here: the card holds what the run's directory holds, and says
    "not measured" of everything else.

    Args:
        how_to_run: lines of Python or of a shell that make an image.
        name, samples: of the two files.
    """
    grid = _newest_grid(model.directory)
    if grid is not None:
        shutil.copyfile(grid, folder / samples)
    sections = [
        front_matter(model, folder),
        f"# {model.run.name}",
        _summary(model),
        f"![Samples of the run at step {int(grid.parent.name[5:])}]({samples})"
        if grid is not None
        else "The run has drawn no samples.",
        f"## How to run it\n\n```\n{how_to_run.strip()}\n```",
        "## Training data\n\n" + _list(_data(model)),
        "## Training\n\n" + _list(_training(model)),
        *_compared_with_base(model.directory),
        "## Evaluation\n\n" + _evaluation(model.directory),
        "## Memorization\n\n" + _memorization(model.directory),
        "## Limits\n\n" + _list(_limits(model)),
        f"## License\n\n{_license(model)}",
    ]
    (folder / name).write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def front_matter(model: TrainedModel, folder: Path) -> str:
    """Return the metadata at the head of the card, as model hubs read it."""
    run, base = model.run, base_of(model.run)
    textual = run.conditioner.text is not None
    fields: dict[str, Any] = {
        "license": (license_of(base) if base else "") or UNKNOWN,
        "library_name": "diffusers" if (folder / PIPELINE).is_file() else "sfumato",
        "pipeline_tag": "text-to-image" if textual else "unconditional-image-generation",
        "tags": ["diffusion", "sfumato", kind_of(type(run.adapter))]
        if run.adapter.needs_base
        else ["diffusion", "sfumato"],
    }
    if base is not None:
        fields["base_model"] = base.name
    # JSON values are YAML values
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items()]
    return "\n".join(["---", *lines, "---"])


def _summary(model: TrainedModel) -> str:
    run, (channels, height, width) = model.run, model.pipeline.image_shape
    base = base_of(run)
    steered = ", ".join(model.pipeline.reads) or "nothing"
    made = f"fine-tuned from {base.name}" if base is not None else "trained from scratch"
    return (
        f"A diffusion model of images of {width} x {height} pixels and {channels} "
        f"channel{'s' if channels > 1 else ''}, {made} with sfumato; steered by "
        f"{steered}."
    )


def _newest_grid(directory: Path) -> Path | None:
    """Return the newest sheet of samples that the run has drawn."""
    named = re.compile(r"step-\d+")
    grids = directory.glob("samples/step-*/grid.png")
    return max((grid for grid in grids if named.fullmatch(grid.parent.name)), default=None)


def _record(directory: Path, name: str) -> dict[str, Any]:
    """Read a JSON file of the run; {} if there is none."""
    try:
        return dict(json.loads((directory / name).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _data(model: TrainedModel) -> list[str]:
    record = _record(model.directory, "data.json")
    if not record:
        return [f"number of images: {UNKNOWN}"]
    categories = record.get("categories") or {}
    lines = [
        f"images: {record.get('images', UNKNOWN)}, of which {record.get('training', UNKNOWN)} for "
        f"training and {record.get('holdout', UNKNOWN)} held out",
        f"with a caption: {record.get('captioned', UNKNOWN)}",
        f"categories: {len(categories) or 'none'}",
        f"license of the images: {record.get('attribution') or UNKNOWN}",
    ]
    notes = record.get("notes") or {}
    counts = {kind: len(names) for kind, names in notes.items()} | (record.get("counts") or {})
    copies = [f"{counts[kind]} {kind.replace('_', ' ')}s" for kind in notes if "dupl" in kind]
    return [*lines, *([f"among them: {', '.join(copies)}"] if copies else [])]


def _training(model: TrainedModel) -> list[str]:
    run, images = model.run, _record(model.directory, "data.json").get("training")
    views = f", each image seen {model.step * run.batch_size / images:.1f} times" if images else ""
    sampling = run.sampling
    return [
        f"trained: {run.adapter.described}",
        f"steps: {model.step} of {run.batch_size} images{views}",
        f"learning rate: {run.optimizer.learning_rate:g}",
        f"weights: averaged ({kind_of(type(run.ema))})",
        f"network: {kind_of(type(run.network))}, predicts {_kind(run.denoiser.parameterization)}",
        f"sampling by default: {sampler_name(sampling.sampler)}, {sampling.steps} steps, guidance "
        f"{sampling.guidance:g}",
    ]


def _compared_with_base(directory: Path) -> list[str]:
    """Return the section on gain and drift of a fine-tuning; [] for other runs."""
    compared = _record(directory, VERDICT).get("best_base")
    if not isinstance(compared, dict):
        return []
    gain, drift = compared["gain"], compared["drift"]
    lines = [
        f"error on held-out new images (squared noise): {NOT_MEASURED}, since none were held out"
        if gain is None
        else f"error on held-out new images (squared noise): {gain['mean']:.1%} below the base's, "
        f"95 % interval {_ends(gain['low'], gain['high'])}",
        "change of what the base knew, over the base's own error there: "
        + (NOT_MEASURED if drift is None else f"{drift:.1%}"),
    ]
    return ["## Compared with its base\n\n" + _list(lines)]


def _ends(low: float | None, high: float | None) -> str:
    return NOT_MEASURED if low is None or high is None else f"[{low:.1%}, {high:.1%}]"


def _kind(value: object) -> str:
    return kind_of(type(value))


def _evaluation(directory: Path) -> str:
    figures = _evaluation_record(directory)
    if not figures:
        return f"Distance to real images, and adherence to the condition: {NOT_MEASURED}."
    head = "| images | n | " + " | ".join(title for title, _ in EVALUATION_COLUMNS) + " |"
    rule = "|---" * (2 + len(EVALUATION_COLUMNS)) + "|"
    notes = [
        f"Features: {figures.get('extractor', UNKNOWN)}. Distances depend on n and on the features: "
        "compare rows of this table only. 95 % intervals are in brackets.",
        *(str(line) for line in (*figures.get("sentences", ()), *figures.get("remarks", ()))),
    ]
    return "\n".join([head, rule, *map(_fidelity_row, figures["rows"])]) + "\n\n" + "\n".join(notes)


def _evaluation_record(directory: Path) -> dict[str, Any]:
    """Return the record of an evaluation; {} without one, or for one of an earlier version."""
    figures = _record(directory, EVALUATION)
    return figures if figures.get("rows") and "copy_rule" in figures else {}


def _fidelity_row(row: Mapping[str, Any]) -> str:
    cells = [row.get("name", ""), row.get("n", "")]
    for title, name in EVALUATION_COLUMNS:
        cells.append(_figure(row.get(name), "{:.3f}" if "distance" in title else "{:.1%}"))
    return f"| {' | '.join(map(str, cells))} |"


def _figure(figure: Mapping[str, Any] | None, form: str) -> str:
    """Format a figure of an evaluation with its interval."""
    if figure is None:
        return NOT_MEASURED
    value = form.format(figure["value"])
    if figure["low"] is None:
        return value
    return f"{value} [{form.format(figure['low'])}, {form.format(figure['high'])}]"


def _memorization(directory: Path) -> str:
    figures = _evaluation_record(directory)
    rows = figures.get("rows") or []
    report = _record(directory, REPORT)
    if not rows and report.get("copies") is not None:
        return (
            f"{report['copies']:.1%} of {report['samples']} samples are copies of a training "
            "image, mirrored ones too."
        )
    if not rows:
        return f"Copies of training images: {NOT_MEASURED}."
    lines = [
        f"{row['name']}: {_figure(row['copies'], '{:.1%}')} of {row['n']} are copies, among "
        f"{row['copies']['reference']}; mean distance to the nearest one "
        f"{row['nearest']['value']:.2f}"
        for row in rows
        if row.get("copies") is not None and row.get("nearest") is not None
    ]
    lines.append(f"copy: {figures.get('copy_rule', UNKNOWN)}")
    return _list(lines)


def _limits(model: TrainedModel) -> list[str]:
    height, width = model.pipeline.image_shape[1:]
    limits = [
        f"It was trained at {width} x {height}; other sizes were {NOT_MEASURED}.",
        "It knows what its training images show, with their gaps and biases; these were "
        f"{NOT_MEASURED}.",
    ]
    if base_of(model.run) is not None and not _compared_with_base(model.directory):
        limits.append(f"What it has forgotten of its base was {NOT_MEASURED} here.")
    return limits


def _license(model: TrainedModel) -> str:
    base = base_of(model.run)
    if base is None:
        return (
            "Trained from scratch: no other model's license applies. That of the training images "
            "is given above; choose one for the model that respects it."
        )
    named = license_of(base)
    return (
        f"Derived from {base.name}, whose license is {named}: it applies to this model too."
        if named
        else f"Derived from {base.name}, which names no license in its README.md: look it up "
        "before you share this model, since it applies to this model too."
    )


def _list(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
