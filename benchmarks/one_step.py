"""Many steps against one: diffusion beside a GAN of as many parameters, trained for the same
processor time, the discriminator's included.

    python benchmarks/one_step.py [--quick] [--json FILE] [--seconds S] [--seeds 3]
    [--images cifar10-train.parquet] [--side 16] [--pool 40000] [--sheets FOLDER]
    [--rate R] [--gamma G] [--batch B]

The GAN has the relativistic pairing loss with zero-centred gradient penalties on real images and
on samples (R3GAN: Huang et al. 2025, arXiv:2501.05441), residual blocks without norms, Adam without
momentum, and averaged weights as diffusion has. Its generator is shaped as the upward half of the
U-Net and has as many parameters; its discriminator is the mirror image. Diffusion is sampled at its
best look; of the GAN's weights at each eighth of its time, those with the least kernel distance to
the images for looks are taken, which costs it nothing. Both are conditioned on the category.
--rate, --gamma and --batch are the GAN's learning rate, weight of the penalties and batch size;
--sheets keeps samples; --quick: digits, 8 px. The sheet --json is read first, and only what it lacks is run.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from held_out import (
    BestLook,
    SampleMeter,
    Split,
    categories_in_turn,
    quiet,
    split,
    trainer_of,
    with_split,
)
from machine import continued, options
from peer_gan import Gan, GanConfig, Shape, gan_shape, parameters
from scipy.stats import t as student
from torch import Tensor

from sfumato.data import DataConfig, Dataset, Parquet, batches, to_float
from sfumato.data.copies import NO_COPY, CopyIndex
from sfumato.evaluation.classifier import Classifier, train_classifier
from sfumato.evaluation.extractors import extractor, pooled
from sfumato.networks import UNetConfig
from sfumato.observability.images import grid_image, save_png
from sfumato.recipes.builtin import digits, emoji
from sfumato.recipes.run import Run
from sfumato.runs.preparation import open_data
from sfumato.training import Budget

TIMED_STEPS, GAN_LOOKS = 20, 8
SAMPLING_STEPS = (1, 2, 4, 10, 25)
SAMPLES, LOOK_SAMPLES, TIMED_SAMPLES = 500, 200, 64
SPACES = ("", "classifier ")
FIGURES = (
    *(f"{space}{figure}" for space in SPACES for figure in ("kid", "good", "variety")),
    *("spread", "categories", "category_accuracy", "copies", "calls", "ms"),
)
# best in a minute of digits; it diverges in three, where the usual settings are better
FAST_GAN = GanConfig(rate=3e-3, gamma=0.15)
Sampler = Callable[[int, int], Tensor]  # (num, seed) -> images in [-1, 1], categories in turn


@dataclass(frozen=True, kw_only=True)
class Arena:
    """What both sides have in common: data, split, and what their samples are judged by."""

    run: Run
    gan: GanConfig
    seconds: float
    dataset: Dataset
    parts: Split
    meters: dict[str, SampleMeter]
    looks: SampleMeter
    classifier: Classifier
    copies: CopyIndex
    shape: Shape

    @classmethod
    def of(cls, run: Run, gan: GanConfig, seconds: float, sizes: tuple[int, int, int]) -> Arena:
        """Open the data, and train the classifier on the training images."""
        whole = open_data(run)
        parts = split(whole, pool=sizes[0], looks=sizes[1], test=sizes[2])
        dataset = with_split(whole, training=parts.pool, held_out=parts.test)
        classifier = train_classifier(dataset, parts.pool)
        reads: tuple[Callable[[Tensor], Tensor], ...] = (
            partial(pooled, extractor("auto")),
            lambda images: classifier.predict(images)[1],
        )
        with tempfile.TemporaryDirectory() as place:
            model = trainer_of(run, parts, parts.pool, Path(place) / "run").state.model
        assert isinstance(run.network, UNetConfig)
        return cls(
            run=run,
            gan=gan,
            seconds=seconds,
            dataset=dataset,
            parts=parts,
            meters={
                space: SampleMeter(dataset, parts.test, read)
                for space, read in zip(SPACES, reads, strict=True)
            },
            looks=SampleMeter(dataset, parts.looks, reads[0]),
            classifier=classifier,
            copies=CopyIndex.of(dataset),
            shape=gan_shape(
                run.network, dataset.image_shape, len(dataset.categories), parameters(model)
            ),
        )

    def new_gan(self, *, steps: int, seed: int) -> Gan:
        """Build an untrained GAN."""
        images = to_float(self.dataset.images(self.parts.pool)[0])
        labels = self.dataset.labels[torch.from_numpy(self.parts.pool)]
        return Gan(self.gan, self.shape, images, labels, steps=steps, seed=seed)

    def figures(self, images: Tensor) -> dict[str, Any]:
        """What is measured of samples, categories in turn."""
        labels = self.classifier.predict(images)[0]
        wanted = categories_in_turn(len(images), len(self.dataset.categories))
        shares = torch.bincount(labels, minlength=len(self.dataset.categories)) / len(labels)
        return {
            **distances(self.meters, images),
            "categories": round(float(torch.special.entr(shares).sum().exp()), 2),
            "category_accuracy": round(float((labels == wanted).double().mean()), 4),
            "spread": round(spread(images, wanted), 4),
            "copies": round(float((self.copies.find(images) != NO_COPY).mean()), 4),
        }

    def real(self) -> dict[str, Any]:
        """The same figures of the test images, whose kernel distance is between their halves."""
        images = to_float(self.dataset.images(self.parts.test)[0])
        labels = self.dataset.labels[torch.from_numpy(self.parts.test)]
        halves = {
            name: SampleMeter(self.dataset, self.parts.test[1::2], meter.read)
            for name, meter in self.meters.items()
        }
        right = self.classifier.predict(images)[0] == labels
        return {
            **self.figures(images),
            **distances(halves, images[::2]),
            "category_accuracy": round(float(right.double().mean()), 4),
            "spread": round(spread(images, labels), 4),
        }


def spread(images: Tensor, labels: Tensor) -> float:
    """Return the standard deviation of pixels within categories, averaged over both."""
    parts = [images[labels == label].flatten(1).std(0).mean() for label in labels.unique()]
    return float(torch.stack(parts).mean())


def distances(meters: dict[str, SampleMeter], images: Tensor) -> dict[str, Any]:
    """Kernel distance, share of good samples and of the variety, in each feature space."""
    return {
        f"{name}{key}": value
        for name, meter in meters.items()
        for key, value in meter.measure(images).items()
    }


def steps_for(arena: Arena) -> dict[str, int]:
    """How many steps of each side take its seconds; they are timed in turn."""
    times: dict[str, list[float]] = {"diffusion": [], "gan": []}
    gan = arena.new_gan(steps=TIMED_STEPS, seed=0)
    with tempfile.TemporaryDirectory() as place:
        run = replace(arena.run, budget=Budget(steps=TIMED_STEPS + 2))
        trainer = trainer_of(run, arena.parts, arena.parts.pool, Path(place) / "run")
        trainer.measure_step(steps=1)  # sets the precision, and warms up
        gan.step()
        supply = batches(trainer.dataset, trainer.plan, start=0)
        sides: dict[str, Callable[[], object]] = {
            "diffusion": lambda: trainer.train_step(next(supply)),
            "gan": gan.step,
        }
        for _ in range(TIMED_STEPS):
            for side, work in sides.items():
                begun = time.process_time()
                work()
                times[side].append(time.process_time() - begun)
    return {side: round(arena.seconds / statistics.median(taken)) for side, taken in times.items()}


def measured(arena: Arena, draw: Sampler, calls: int, sheet: Path | None) -> dict[str, Any]:
    """Sample, measure, time, and keep a sheet of the first samples."""
    images = draw(SAMPLES, 1)
    begun = time.process_time()
    draw(TIMED_SAMPLES, 2)
    spent = time.process_time() - begun
    if sheet is not None:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        columns = len(arena.dataset.categories)
        save_png(grid_image((images[: 8 * columns] + 1) / 2, columns=columns), sheet)
        np.save(sheet.with_suffix(".npy"), images.numpy())
    return {
        **arena.figures(images),
        "calls": calls,
        "ms": round(1000 * spent / TIMED_SAMPLES, 2),
    }


def diffusion_rows(arena: Arena, steps: int, seed: int, sheets: Path | None) -> dict[str, Any]:
    """Train diffusion, and measure its best look at each number of sampling steps."""
    run = replace(arena.run, budget=Budget(steps=steps), seed=seed)
    with tempfile.TemporaryDirectory() as place:
        trainer = trainer_of(run, arena.parts, arena.parts.pool, Path(place) / "run")
        trainer.run()
        found = BestLook.of(trainer, run)
    rows = {}
    for number in SAMPLING_STEPS:

        def draw(num: int, seed: int, number: int = number) -> Tensor:
            return found.samples(num, seed=seed, steps=number).clamp(-1, 1)

        sheet = sheets and sheets / f"diffusion-{number}-seed{seed}.png"
        row = measured(arena, draw, number, sheet)
        rows[f"diffusion, {number} steps"] = {**row, "best_step": found.look.step, "steps": steps}
    return rows


def gan_rows(arena: Arena, steps: int, seed: int, sheets: Path | None) -> dict[str, Any]:
    """Train the GAN, and measure the best of its looks."""
    gan = arena.new_gan(steps=steps, seed=seed)
    looks: list[tuple[float, int, dict[str, Tensor]]] = []
    for number in range(1, GAN_LOOKS + 1):
        while gan.done < number * steps // GAN_LOOKS:
            losses = gan.step()
        distance = arena.looks.measure(gan.samples(LOOK_SAMPLES, 3))["kid"][0]
        looks.append((distance, gan.done, copy.deepcopy(gan.average.state_dict())))
        print("GAN look", gan.done, distance, losses, flush=True)
    _, best_step, weights = min(looks, key=lambda look: look[0])
    gan.average.load_state_dict(weights)
    row = measured(arena, gan.samples, 1, sheets and sheets / f"gan-seed{seed}.png")
    course = [round(distance, 3) for distance, _, _ in looks]
    return {"GAN, one step": {**row, "best_step": best_step, "steps": steps, "looks": course}}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, with Student's 95 % intervals."""
    result = {}
    for key in FIGURES:
        values = np.array([np.ravel(row[key])[0] for row in rows])
        half = 0.0
        if len(values) > 1:
            spread = values.std(ddof=1) / math.sqrt(len(values))
            half = float(student.ppf(0.975, len(values) - 1) * spread)
        mean = float(values.mean())
        result[key] = [round(value, 4) for value in (mean, mean - half, mean + half)]
    return result


def chosen_run(chosen: Any) -> tuple[Run, float, tuple[int, int, int]]:
    """The run, seconds of a side, and the images of pool, looks and test."""
    if chosen.quick:
        base, seconds, sizes = digits(), 60.0, (1200, 150, 447)
        base = replace(base, batch_size=32, network=replace(base.network, channels=16))
    else:
        base, seconds, sizes = emoji(), 1800.0, (chosen.pool, 500, 2000)
        data = DataConfig(source=Parquet(chosen.images), resolution=chosen.side)
        base = replace(base, data=data)
    run = quiet(replace(base, sampling=replace(base.sampling, guidance=1.0)), look_images=50)
    return run, chosen.seconds or seconds, sizes


def main() -> None:
    """Run what is missing, and average."""
    chosen = options(
        __doc__.splitlines()[0], seconds=0.0, seeds=3, images="cifar10-train.parquet", side=16,
        pool=40_000, sheets="", rate=0.0, gamma=0.0, batch=0,
    )  # fmt: skip
    torch.set_num_threads(1)
    run, seconds, sizes = chosen_run(chosen)
    usual = FAST_GAN if chosen.quick else GanConfig()
    gan = replace(
        usual,
        rate=chosen.rate or usual.rate,
        gamma=chosen.gamma or usual.gamma,
        batch_size=chosen.batch or usual.batch_size,
    )
    gan_settings = {"rate": gan.rate, "gamma": gan.gamma, "batch": gan.batch_size}
    settings = {"quick": chosen.quick, "seconds": seconds, **gan_settings}
    sheet = continued(chosen.json, settings, rows="runs")
    arena = Arena.of(run, gan, seconds, sizes)
    sheets = Path(chosen.sheets) if chosen.sheets else None
    if "steps" not in sheet:
        sheet["steps"] = steps_for(arena)
    sheet["real"] = arena.real()
    print(sheet["steps"], arena.shape, sheet["real"], flush=True)
    steps = sheet["steps"]
    for seed in range(chosen.seeds):
        for side in ("gan", "diffusion"):
            if f"{side} {seed}" in sheet["runs"]:
                continue
            rows = (
                gan_rows(arena, steps[side], seed, sheets)
                if side == "gan"
                else diffusion_rows(arena, steps[side], seed, sheets)
            )
            sheet["runs"][f"{side} {seed}"] = rows
            print(json.dumps(rows), flush=True)
            if chosen.json is not None:
                chosen.json.write_text(json.dumps(sheet))
    by_name: dict[str, list[dict[str, Any]]] = {}
    for rows in sheet["runs"].values():
        for name, row in rows.items():
            by_name.setdefault(name, []).append(row)
    sheet["table"] = {name: summary(rows) for name, rows in by_name.items()}
    print(json.dumps(sheet["table"], indent=1))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(sheet))


if __name__ == "__main__":
    main()
