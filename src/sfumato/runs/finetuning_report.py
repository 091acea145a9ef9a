"""The report of a fine-tuning: what was gained, what was forgotten, what was copied."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from sfumato.condition import reorder
from sfumato.data import Dataset, index, listed, to_float
from sfumato.data.copies import NO_COPY, CopyIndex
from sfumato.errors import RunError
from sfumato.generation.pipeline import Pipeline
from sfumato.generation.request import ResolvedRequest
from sfumato.interop.diffusers_parity import Parity, compare_with_diffusers
from sfumato.observability.images import grid_image, save_png
from sfumato.observability.metrics_file import read_lines
from sfumato.observability.tables import format_table
from sfumato.recipes.resolver import resolve
from sfumato.runs.base import known_contexts
from sfumato.runs.export import trained_model
from sfumato.runs.loading import load
from sfumato.storage.atomic import write_text
from sfumato.storage.run_directory import RunDirectory
from sfumato.training.base_comparison import known_batch
from sfumato.training.evidence import DRIFT_LIMIT, Comparison, looks_of
from sfumato.training.stopping import StoppingVerdict, verdict

FOLDER = "finetuning"  # in a run
SHOWN = 12  # images in a row
SAMPLES = 32
HEAD = ("log-SNR", "gain on new images, squared noise", "change of what was known")


@dataclass(frozen=True, kw_only=True)
class Level:
    """A range of noise levels.

    Attributes:
        logsnr_low, logsnr_high: its ends.
        gain: error of the base minus that of the model on held-out new images, squared noise; None
            if nothing is held out.
        gain_low, gain_high: 95 % interval of the gain; None where one image alone was measured.
        drift: mean squared change of the predicted noise on images of what the base knew; None
            where nothing of the kind is known.
    """

    logsnr_low: float
    logsnr_high: float
    gain: float | None
    gain_low: float | None
    gain_high: float | None
    drift: float | None

    def gain_with_interval(self) -> str:
        """Format the gain, if it was measured, with its interval, if it has one."""
        if self.gain is None:
            return "not measured"
        if self.gain_low is None or self.gain_high is None:
            return f"{self.gain:+.4f}"
        return f"{self.gain:+.4f} [{self.gain_low:+.4f}, {self.gain_high:+.4f}]"


@dataclass(frozen=True, kw_only=True, eq=False)
class FinetuningReport:
    """What a fine-tuning came to, at the step that the verdict names.

    Attributes:
        verdict: whether to stop, and which step to use.
        levels: gain and drift by noise level.
        copies: share of samples that are copies of a training image: see `CopyIndex.find`.
        nearest, nearest_held_out: mean distance of samples, and of held-out images, to the nearest
            training image by means of 8 x 8; the latter is None without held-out images.
        spread, spread_real: mean deviation of pixels between samples, and between real new images;
            the latter is None for one image.
        samples: how many samples were generated.
        images: sheets by file name.
        parity: one image beside that of diffusers from the exported folder; None if it was not
            made yet.
    """

    verdict: StoppingVerdict
    levels: Sequence[Level]
    copies: float | None
    nearest: float
    nearest_held_out: float | None
    spread: float
    spread_real: float | None
    samples: int
    images: Mapping[str, Image.Image]
    parity: Parity | None = None

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
            "parity": None if self.parity is None else self.parity.plain(),
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
        return "\n".join(
            [
                self.verdict.sentence,
                *_measured(self.verdict),
                *([format_table([HEAD, *rows])] if rows else []),
                self._samples_line(),
            ]
        )

    def _samples_line(self) -> str:
        copies = "not measured" if self.copies is None else f"{self.copies:.0%}"
        held_out, real = self.nearest_held_out, self.spread_real
        return (
            f"{self.samples} samples: copies {copies}; distance to the nearest training image "
            f"{self.nearest:.2f}{'' if held_out is None else f' (held-out: {held_out:.2f})'}; "
            f"deviation between them {self.spread:.3f}"
            f"{'' if real is None else f' (real images: {real:.3f})'}"
        )

    def save(self, folder: Path) -> None:
        """Write report.json and the sheets of images into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, image in self.images.items():
            save_png(image, folder / name)
        write_text(folder / "report.json", json.dumps(self.plain(), indent=1))


def _measured(found: StoppingVerdict) -> list[str]:
    """Return a line on what was measured at the step to use; [] if nothing was."""
    base, parts = found.best_base or Comparison(), []
    if base.gain is not None:
        gain, low, high = base.gain
        parts.append(
            f"error on held-out new images {gain:.1%} below the base's [{low:.1%}, {high:.1%}]"
        )
    if base.drift is not None:
        parts.append(
            f"what the base knew has changed by {base.drift:.1%} of its error (limit "
            f"{DRIFT_LIMIT:.0%})"
        )
    return [f"at step {found.best_step}: {'; '.join(parts)}"] if parts else []


def finetuning_report(path: str | Path) -> FinetuningReport:
    """Compare a fine-tuned model with its base and its training images; samples are generated.

    Raises:
        RunError: if the run is not a fine-tuning that was compared with its base.
    """
    directory = RunDirectory.existing(Path(path))
    looks = looks_of(read_lines(directory.looks), directory.data_record())
    if not looks or looks[-1].base is None:
        raise RunError(
            "was not compared with a base",
            where=str(path),
            hint="only runs of `sfumato finetune` are, while they train",
        )
    found = verdict(looks)
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
    learned = CopyIndex.of(dataset, training)
    neighbours = learned.neighbours(samples * 2 - 1)
    images = {"new.png": _beside_nearest(samples, _images(dataset, neighbours.positions), pipeline)}
    if count:
        request = ResolvedRequest.of(context, pipeline.image_shape, count)
        after = pipeline.sample_request(request, seed=run.seed)
        before = load_file(directory.base_samples)["images"]
        images["known.png"] = _rows(before, after, ("base", "tuned"), pipeline)
    return FinetuningReport(
        verdict=found,
        levels=_levels(read_lines(directory.metrics), found.best_step),
        copies=float((learned.find(samples * 2 - 1) != NO_COPY).mean()),
        nearest=float(neighbours.first.mean()),
        nearest_held_out=float(learned.neighbours(held_out * 2 - 1).first.mean())
        if len(held_out)
        else None,
        spread=float(samples.std(0).mean()),
        spread_real=_spread(torch.cat([real, held_out])),
        samples=SAMPLES,
        images=images,
    )


def with_parity(report: FinetuningReport, path: str | Path) -> FinetuningReport:
    """Return a run's report with one image of the model beside that of diffusers.

    It takes much memory, and comes last for that reason.
    """
    directory = Path(path)
    trained = trained_model(directory, weights="auto", step=report.verdict.best_step)
    captions = (entry.captions for entry in listed(trained.run.data.source).entries)
    prompt = next((texts[0] for texts in captions if texts), trained.run.data.caption or "a photo")
    parity = compare_with_diffusers(trained, prompt, folder=directory)
    if parity.images is None:
        return replace(report, parity=parity)
    pair = _rows(parity.images[:1], parity.images[1:], ("sfumato", "diffusers"), trained.pipeline)
    return replace(report, parity=parity, images={**report.images, "parity.png": pair})


def _spread(images: Tensor) -> float | None:
    """Return the mean deviation of pixels between images (n, C, H, W); None for one image."""
    return float(images.std(0).mean()) if len(images) > 1 else None


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
    """Return gain and drift by level, of the comparison at a step; [] if neither was measured."""
    names = ("validation/gain/bins", "validation/drift/bins")
    compared = [
        record
        for record in records
        if record["step"] == step and any(name in record for name in names)
    ]
    gains, drifts = (
        {
            (row["logsnr_low"], row["logsnr_high"]): row
            for record in compared[-1:]
            for row in record.get(name, ())
        }
        for name in names
    )
    nothing = {"mean": None, "low": None, "high": None}
    return [
        Level(
            logsnr_low=ends[0],
            logsnr_high=ends[1],
            gain=gains.get(ends, nothing)["mean"],
            gain_low=gains.get(ends, nothing)["low"],
            gain_high=gains.get(ends, nothing)["high"],
            drift=drifts.get(ends, nothing)["mean"],
        )
        for ends in sorted(gains.keys() | drifts.keys())
    ]
