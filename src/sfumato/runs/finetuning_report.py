"""The report of a fine-tuning: what was gained, what was forgotten, what was copied."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from sfumato.condition import reorder
from sfumato.data import Dataset, index, to_float
from sfumato.errors import RunError
from sfumato.evaluation.memorization import nearest
from sfumato.generation.pipeline import Pipeline
from sfumato.generation.request import ResolvedRequest
from sfumato.observability.images import grid_image, save_png
from sfumato.observability.metrics_file import read_lines
from sfumato.observability.tables import format_table
from sfumato.recipes.resolver import resolve
from sfumato.runs.base import known_contexts
from sfumato.runs.loading import load
from sfumato.storage.run_directory import RunDirectory
from sfumato.training.base_comparison import known_batch
from sfumato.training.verdict import DRIFT_LIMIT, Verdict

FOLDER = "finetuning"  # in a run
SHOWN = 12  # images in a row
SAMPLES = 32
HEAD = ("log-SNR", "gain on new images, squared noise", "change of what was known")


@dataclass(frozen=True, kw_only=True)
class Level:
    """A range of noise levels.

    Attributes:
        logsnr_low, logsnr_high: its ends.
        gain: error of the base minus that of the model on held-out new images, squared noise.
        gain_low, gain_high: 95 % interval of the gain; None where one image alone was measured.
        drift: mean squared change of the predicted noise on images of what the base knew; None
            where nothing of the kind is known.
    """

    logsnr_low: float
    logsnr_high: float
    gain: float
    gain_low: float | None
    gain_high: float | None
    drift: float | None

    def gain_with_interval(self) -> str:
        """Format the gain with its interval, if it has one."""
        if self.gain_low is None or self.gain_high is None:
            return f"{self.gain:+.4f}"
        return f"{self.gain:+.4f} [{self.gain_low:+.4f}, {self.gain_high:+.4f}]"


@dataclass(frozen=True, kw_only=True, eq=False)
class FinetuningReport:
    """What a fine-tuning came to, at the step that the verdict names.

    Attributes:
        verdict: which step to use, and whether to stop.
        levels: gain and drift by noise level.
        copies: share of samples that are far closer to one training image than to any other.
        nearest, nearest_held_out: mean distance of samples, and of held-out images, to the nearest
            training image; the latter is None without held-out images.
        spread, spread_real: mean deviation of pixels between samples, and between real new images.
        samples: how many samples were generated.
        images: sheets by file name.
    """

    verdict: Verdict
    levels: Sequence[Level]
    copies: float
    nearest: float
    nearest_held_out: float | None
    spread: float
    spread_real: float
    samples: int
    images: Mapping[str, Image.Image]

    def plain(self) -> dict[str, Any]:
        """Return all figures as plain data."""
        return {
            "verdict": self.verdict.plain(),
            "levels": [asdict(level) for level in self.levels],
            **{
                name: getattr(self, name)
                for name in ("copies", "nearest", "nearest_held_out", "spread", "spread_real")
            },
            "samples": self.samples,
        }

    def table(self) -> str:
        """Format the figures as text."""
        rows = [
            (
                f"{level.logsnr_low:+.1f} to {level.logsnr_high:+.1f}",
                level.gain_with_interval(),
                "" if level.drift is None else f"{level.drift:.4f}",
            )
            for level in self.levels
        ]
        chosen = self.verdict.chosen
        lines = [self.verdict.sentence()]
        if chosen is not None:
            forgotten = (
                ""
                if chosen.drift is None
                else f"; what the base knew has changed by {chosen.drift:.1%} of its error (limit "
                f"{DRIFT_LIMIT:.0%})"
            )
            lines.append(
                f"at step {chosen.step}: error on held-out new images {chosen.gain:.1%} below the "
                f"base's [{chosen.gain_low:.1%}, {chosen.gain_high:.1%}]{forgotten}"
            )
        held_out = (
            "" if self.nearest_held_out is None else f" (held-out: {self.nearest_held_out:.2f})"
        )
        return "\n".join(
            [
                *lines,
                format_table([HEAD, *rows]),
                f"{self.samples} samples: copies {self.copies:.0%}; distance to the nearest training image "
                f"{self.nearest:.2f}{held_out}; deviation between them {self.spread:.3f} (real "
                f"images: {self.spread_real:.3f})",
            ]
        )

    def save(self, folder: Path) -> None:
        """Write report.json and the sheets of images into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, image in self.images.items():
            save_png(image, folder / name)
        (folder / "report.json").write_text(json.dumps(self.plain(), indent=1))


def finetuning_report(path: str | Path) -> FinetuningReport:
    """Compare a fine-tuned model with its base and its training images; samples are generated.

    Raises:
        RunError: if the run is not a fine-tuning that was compared with its base.
    """
    directory = RunDirectory.existing(Path(path))
    verdict = Verdict.read(directory.verdict)
    if verdict.last is None:
        raise RunError(
            "was not compared with a base",
            where=str(path),
            hint="only runs of `sfumato finetune` are, at every validation",
        )
    run, pipeline = resolve(directory.path), load(path)
    dataset = index(run.data, annotations=run.conditioner.names)
    known = known_contexts(run, pipeline.model, pipeline.info, dataset)
    context, count = known_batch(known)
    training = dataset.with_common_shape(dataset.training)
    real, held_out = _images(dataset, training), _images(dataset, dataset.holdout)
    new = _context_of(pipeline, dataset, training)
    samples = pipeline.sample_request(
        ResolvedRequest.of(new, pipeline.image_shape, SAMPLES), seed=run.seed
    )
    neighbours = nearest(samples, real)
    images = {"new.png": _beside_nearest(samples, real[neighbours.index], pipeline)}
    if count:
        request = ResolvedRequest.of(context, pipeline.image_shape, count)
        after = pipeline.sample_request(request, seed=run.seed)
        before = load_file(directory.base_samples)["images"]
        images["known.png"] = _rows(before, after, ("base", "tuned"), pipeline)
    step = (verdict.chosen or verdict.last).step
    return FinetuningReport(
        verdict=verdict,
        levels=_levels(read_lines(directory.metrics), step),
        copies=neighbours.copies,
        nearest=float(neighbours.first.mean()),
        nearest_held_out=float(nearest(held_out, real).first.mean()) if len(held_out) else None,
        spread=float(samples.std(0).mean()),
        spread_real=float(torch.cat([real, held_out]).std(0).mean()),
        samples=SAMPLES,
        images=images,
    )


def _images(dataset: Dataset, positions: np.ndarray[Any, Any]) -> Tensor:
    """Return images of the usual shape in [0, 1]."""
    usual = dataset.with_common_shape(positions)
    if not len(usual):
        return torch.zeros(0, *dataset.image_shape)
    return (to_float(dataset.images(usual).pixels) + 1) / 2


def _context_of(
    pipeline: Pipeline, dataset: Dataset, positions: np.ndarray[Any, Any]
) -> dict[str, Any]:
    """Return the contexts of training images that a request may set, repeated to SAMPLES."""
    context = dataset.context(positions)
    numbers = [number % len(positions) for number in range(SAMPLES)]
    return reorder(
        {name: value for name, value in context.items() if name in pipeline.reads}, numbers
    )


def _beside_nearest(samples: Tensor, neighbours: Tensor, pipeline: Pipeline) -> Image.Image:
    distances = (samples - neighbours).flatten(1).norm(dim=1)
    closest = distances.argsort()[:SHOWN]
    return _rows(
        samples[closest], neighbours[closest], ("sample", "nearest training image"), pipeline
    )


def _rows(above: Tensor, below: Tensor, labels: tuple[str, str], pipeline: Pipeline) -> Image.Image:
    columns = min(SHOWN, len(above))
    both = torch.cat([above[:columns], below[:columns]])
    return grid_image(both, columns=columns, row_labels=labels, alpha=pipeline.info.alpha)


def _levels(records: Sequence[Mapping[str, Any]], step: int) -> list[Level]:
    """Return gain and drift by level, of the comparison at a step."""
    record = next(
        record
        for record in reversed(records)
        if record["step"] == step and "validation/gain/bins" in record
    )
    drifts = {
        (row["logsnr_low"], row["logsnr_high"]): row["mean"]
        for row in record.get("validation/drift/bins", ())
    }
    return [
        Level(
            logsnr_low=row["logsnr_low"],
            logsnr_high=row["logsnr_high"],
            gain=row["mean"],
            gain_low=row["low"],
            gain_high=row["high"],
            drift=drifts.get((row["logsnr_low"], row["logsnr_high"])),
        )
        for row in record["validation/gain/bins"]
    ]
