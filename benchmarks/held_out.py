"""What the benchmarks of data and of models share: one split for all runs of a set, a run at its
best look, and figures of its samples beside test images that no run has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.condition import to_device
from sfumato.data import Dataset, to_float
from sfumato.data.dataset import DatasetParts
from sfumato.evaluation.coverage import RealImages
from sfumato.evaluation.distances import DistanceEstimate, KernelReference, compare_kernels
from sfumato.generation.pipeline import Pipeline
from sfumato.generation.request import ResolvedRequest
from sfumato.recipes.run import Run
from sfumato.runs import prepare
from sfumato.runs.training import build_trainer
from sfumato.storage.checkpoint import load_snapshot
from sfumato.storage.run_directory import RunDirectory
from sfumato.training import Trainer
from sfumato.training.config import (
    CheckpointConfig,
    PreviewConfig,
    ValidationConfig,
)
from sfumato.training.denoising_error import make_triples, measure
from sfumato.training.looks import Looks
from sfumato.training.stopping import Look, best

Positions = NDArray[np.int64]
NEVER = 10**9
BINS, ERROR_SEED = 10, 7


class Split(NamedTuple):
    """Positions of images that may be trained on, of those for looks, and of those for the test."""

    pool: Positions
    looks: Positions
    test: Positions


def split(dataset: Dataset, *, pool: int, looks: int, test: int, seed: int = 0) -> Split:
    """Draw the parts at random; of a group of near-duplicates one image is taken."""
    _, firsts = np.unique(dataset.clusters, return_index=True)
    order = np.random.default_rng(seed).permutation(firsts)
    if len(order) < pool + looks + test:
        raise SystemExit(f"{len(order)} different images, and {pool + looks + test} are needed")
    ends = np.cumsum([pool, looks, test])
    return Split(*(np.sort(part) for part in np.split(order[: ends[-1]], ends[:-1])))


def with_split(dataset: Dataset, *, training: Positions, held_out: Positions) -> Dataset:
    """Return the dataset with other parts; positions that appear twice are trained on twice."""
    chosen, drawn = replace(dataset), np.unique(training)
    parts = DatasetParts(whole=drawn, training=drawn, holdout=held_out, named={})
    # a dataset splits itself, by a hash, when it is first asked
    chosen.__dict__.update(parts=parts, epoch=np.sort(training))
    return chosen


def quiet(run: Run, *, look_images: int) -> Run:
    """Return the run without previews, checkpoints and searches for copies along the way."""
    rare = {"every_minutes": None, "every_steps": NEVER}
    return replace(
        run,
        precision="float32",
        compile="off",
        validation=ValidationConfig(**rare, samples=look_images * BINS, bins=BINS, copy_samples=0),
        preview=PreviewConfig(**rare, num=2),
        checkpoint=CheckpointConfig(**rare, keep=1),
    )


def trainer_of(run: Run, parts: Split, training: Positions, place: Path) -> Trainer:
    """Build the trainer of a run on some images of the pool."""
    prepared = prepare(run)
    dataset = with_split(prepared.dataset, training=training, held_out=parts.looks)
    trainer = build_trainer(replace(prepared, dataset=dataset), RunDirectory.create(place))
    trainer.task.info = prepared.info
    return trainer


@dataclass(frozen=True, kw_only=True)
class BestLook:
    """The averaged weights at the best look of a run.

    Attributes:
        look: the best one; last: the last one.
    """

    pipeline: Pipeline
    look: Look
    last: Look

    @classmethod
    def of(cls, trainer: Trainer, run: Run) -> BestLook:
        """Take them from a trainer that has finished."""
        hook = next(hook for hook in trainer.hooks if isinstance(hook, Looks))
        looks = hook.looks(trainer)
        kept, model = best(looks), trainer.state.average
        model.load_state_dict(load_snapshot(trainer.directory.best, step=kept.step))
        pipeline = Pipeline(
            model=model,
            autoencoder=trainer.task.autoencoder,
            sampling=replace(run.sampling, guidance=1.0),
            info=trainer.task.info,
            image_shape=trainer.dataset.image_shape,
        )
        return cls(pipeline=pipeline, look=kept, last=looks[-1])

    def errors(self, dataset: Dataset, positions: Positions, run: Run) -> Tensor:
        """Return the noise error of each image, averaged over levels, (n,)."""
        triples = make_triples(
            to_float(dataset.images(positions)[0]),
            run.objective.schedule, seed=ERROR_SEED, bins=BINS,
        )  # fmt: skip
        model = self.pipeline.model
        with torch.no_grad():
            context = to_device(dataset.context(positions), torch.device("cpu"))
            condition = model.conditioner(context, len(positions))
        return measure(model.denoiser(), triples, condition, batch_size=500).eps_square.mean(1)

    def samples(self, num: int, *, seed: int, steps: int | None = None) -> Tensor:
        """Return samples of the categories in turn, (num, C, H, W) in [-1, 1]."""
        sampling = self.pipeline.sampling
        pipeline = replace(self.pipeline, sampling=replace(sampling, steps=steps or sampling.steps))
        request = ResolvedRequest.of(
            {"category": categories_in_turn(num, len(pipeline.info.categories))},
            pipeline.image_shape,
            num,
        )
        return pipeline.sample_request(request, seed=seed) * 2 - 1


def categories_in_turn(num: int, count: int) -> Tensor:
    """Return the categories that samples are made of, (num,)."""
    return torch.arange(num) % count


class SampleMeter:
    """Compares samples with test images by their features.

    Args:
        read: images (n, C, H, W) in [-1, 1] -> features (n, d).
    """

    def __init__(
        self, dataset: Dataset, positions: Positions, read: Callable[[Tensor], Tensor]
    ) -> None:
        self.read = read
        features = read(to_float(dataset.images(positions)[0]))
        self.reference, self.real = KernelReference(features), RealImages(features)

    def measure(self, images: Tensor) -> dict[str, Any]:
        """Return kernel distance, share of good samples and share of the variety, with intervals."""
        features = self.read(images.clamp(-1, 1))
        coverage = self.real.measure(features)
        return {
            "kid": plain(compare_kernels(features, [self.reference]).estimates[0]),
            "good": plain(coverage.good),
            "variety": plain(coverage.variety),
        }


def plain(estimate: DistanceEstimate) -> list[float]:
    """Return [value, low, high], rounded."""
    return [round(value, 4) for value in estimate]
