"""Whether data matter more than the model: the error on test images that no run has seen, over the
number of training images and the width of the network, at equal compute.

    python benchmarks/data_or_model.py [--quick] [--json FILE] [--seconds S] [--seeds 3]
    [--images cifar10-train.parquet] [--side 32]

Each run has the same processor seconds on one core (in steps, measured before the first run), and
is judged at its best look. The error is fitted as log error = a + b log2 n + c log2 width + d log2
n log2 width around the middle of the grid; intervals are of a bootstrap over seeds and test images.
At the middle of the grid, other images of the same number follow: the most diverse and the least
diverse of each category, and half of them duplicates. --quick: digits, 8 px. The sheet --json is
read first, and only what it lacks is run.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grid_fit import Floats, bootstrap, estimate, summary
from held_out import (
    BestLook,
    Positions,
    SampleMeter,
    Split,
    quiet,
    split,
    trainer_of,
)
from machine import continued, options

from sfumato.data import DataConfig, Dataset, Parquet, batches, to_float
from sfumato.data.check.inspect import vendi
from sfumato.evaluation.extractors import extractor, pooled
from sfumato.evaluation.figures import unit_length
from sfumato.networks import UNetConfig
from sfumato.recipes.builtin import digits, emoji
from sfumato.recipes.run import Run
from sfumato.runs.preparation import open_data
from sfumato.training import Budget

SAMPLES, SAMPLING_STEPS = 200, 15
TIMED_STEPS = 20
RANDOM, DIVERSE, ALIKE, DUPLICATES = "random", "most diverse", "least diverse", "half duplicates"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is compared.

    Attributes:
        seconds: of one core, for each run.
        looks, test: images for looks and for the test.
    """

    base: Run
    numbers: tuple[int, ...]
    widths: tuple[int, ...]
    seconds: float
    looks: int
    test: int

    def run(self, width: int, *, seed: int, steps: int) -> Run:
        """The run of one width."""
        network = self.base.network
        assert isinstance(network, UNetConfig)
        heads = min(32, width * network.multipliers[-1])
        run = replace(
            self.base,
            network=replace(network, channels=width, head_channels=heads),
            seed=seed,
            budget=Budget(steps=steps),
            sampling=replace(self.base.sampling, steps=SAMPLING_STEPS, guidance=1.0),
        )
        return quiet(run, look_images=self.looks)

    @property
    def middle(self) -> tuple[int, int]:
        """The number of images and the width in the middle."""
        return self.numbers[len(self.numbers) // 2], self.widths[len(self.widths) // 2]


def grid(chosen: Any) -> Grid:
    """Digits for --quick, else the images of --images."""
    if chosen.quick:
        return Grid(
            base=replace(digits(), batch_size=32),
            numbers=(100, 400, 1400),
            widths=(8, 16, 32),
            seconds=chosen.seconds or 30,
            looks=50,
            test=347,
        )
    base = emoji()
    data = DataConfig(source=Parquet(chosen.images), resolution=chosen.side)
    return Grid(
        base=replace(base, data=data, network=replace(base.network, dropout=0.0)),
        numbers=(250, 1000, 4000),
        widths=(16, 32, 64),
        seconds=chosen.seconds or 360,
        looks=100,
        test=1000,
    )


def steps_for(measured: Grid, parts: Split) -> dict[int, int]:
    """How many steps of each width take the seconds of a run; the widths are timed in turn."""
    times: dict[int, list[float]] = {width: [] for width in measured.widths}
    with tempfile.TemporaryDirectory() as place:
        trainers = {}
        for width in measured.widths:
            run = measured.run(width, seed=0, steps=TIMED_STEPS + 1)
            trainer = trainer_of(run, parts, parts.pool, Path(place) / str(width))
            trainer.measure_step(steps=1)  # sets the precision, and warms up
            trainers[width] = trainer, batches(trainer.dataset, trainer.plan, start=0)
        for _ in range(TIMED_STEPS):
            for width, (trainer, supply) in trainers.items():
                begun = time.process_time()
                trainer.train_step(next(supply))
                times[width].append(time.process_time() - begun)
    return {
        width: round(measured.seconds / statistics.median(taken)) for width, taken in times.items()
    }


def farthest(features: Floats, count: int, *, first: int) -> Positions:
    """Return `count` rows, each the farthest from those before it (Gonzalez 1985)."""
    chosen, distances = [first], np.linalg.norm(features - features[first], axis=1)
    while len(chosen) < count:
        chosen.append(int(distances.argmax()))
        distances = np.minimum(distances, np.linalg.norm(features - features[chosen[-1]], axis=1))
    return np.array(chosen)


def nearest(features: Floats, count: int, *, first: int) -> Positions:
    """Return the `count` rows nearest to one of them, itself included."""
    result: Positions = np.linalg.norm(features - features[first], axis=1).argsort()[:count]
    return result


@dataclass(frozen=True, kw_only=True, eq=False)
class Subsets:
    """Training images of the pool, drawn in several ways.

    Attributes:
        labels: categories of the pool's images.
        features: of the pool's images, by which they are called alike.
    """

    pool: Positions
    labels: Positions
    features: Floats

    @classmethod
    def of(cls, dataset: Dataset, pool: Positions) -> Subsets:
        """Compute features, without their mean and of unit length."""
        features = pooled(extractor("auto"), to_float(dataset.images(pool)[0])).double()
        return cls(
            pool=pool,
            labels=dataset.labels.numpy()[pool],
            features=unit_length(features - features.mean(0)).numpy(),
        )

    def draw(self, kind: str, count: int, *, seed: int) -> Positions:
        """Return `count` positions, some of them several times if half are duplicates."""
        generator = np.random.default_rng([seed, count])
        if kind == RANDOM:
            return generator.choice(self.pool, count, replace=False)
        if kind == DUPLICATES:
            distinct = generator.choice(self.pool, count // 2, replace=False)
            return np.concatenate([distinct, generator.choice(distinct, count - count // 2)])
        choose = {DIVERSE: farthest, ALIKE: nearest}[kind]
        parts, sizes = [], np.bincount(self.labels)
        ends = np.round(np.cumsum(sizes) * count / sizes.sum()).astype(int)
        for label, number in enumerate(np.diff(ends, prepend=0)):
            rows = np.flatnonzero(self.labels == label)
            first = int(generator.integers(len(rows)))
            parts.append(rows[choose(self.features[rows], number, first=first)])
        return self.pool[np.concatenate(parts)]

    def vendi(self, positions: Positions) -> float:
        """Return the effective number of different images (Vendi score)."""
        return vendi(self.features[np.searchsorted(self.pool, positions)])


def others(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The log error of other images of the same number, less that of images drawn at random."""

    def errors(kind: str) -> list[list[float]]:
        return [row["errors"] for row in rows if row["subset"] == kind]

    result = {}
    for kind in (DIVERSE, ALIKE, DUPLICATES):
        both = np.array([[errors(RANDOM)], [errors(kind)]])
        logs = np.log(both.mean(3)).mean(2)
        drawn = bootstrap(both, lambda means: means[1] - means[0])
        result[kind] = estimate(float(logs[1, 0] - logs[0, 0]), drawn[:, 0])
    return result


def trained(measured: Grid, parts: Split, row: dict[str, Any], subsets: Subsets) -> dict[str, Any]:
    """Train one run, and return its row with figures."""
    run = measured.run(row["width"], seed=row["seed"], steps=row["steps"])
    training = subsets.draw(row["subset"], row["n"], seed=row["seed"])
    with tempfile.TemporaryDirectory() as place:
        trainer = trainer_of(run, parts, training, Path(place) / "run")
        begun = time.process_time()
        trainer.run()
        spent = time.process_time() - begun
        found = BestLook.of(trainer, run)
    errors = found.errors(trainer.dataset, parts.test, run)
    return {
        **row,
        "cpu_s": round(spent, 1),
        "vendi": round(subsets.vendi(training), 1),
        "best_step": found.look.step,
        "best_views": round(found.look.views, 1),
        "error": round(float(errors.mean()), 5),
        "ratio": [round(value, 3) for value in found.look.ratio],
        "risen_at_the_end": round(found.last.error / found.look.error - 1, 3),
        "samples": found.samples(SAMPLES, seed=row["seed"]),
        "errors": [round(value, 5) for value in errors.tolist()],
    }


def planned(measured: Grid, seeds: int, steps: dict[int, int]) -> Iterator[tuple[str, Any]]:
    """The rows to run by their names, one seed after another, so that a part says something."""
    middle = measured.middle
    for seed in range(seeds):
        cells = [(n, width, RANDOM) for n in measured.numbers for width in measured.widths]
        cells += [(*middle, kind) for kind in (DIVERSE, ALIKE, DUPLICATES)]
        for n, width, kind in cells:
            row = {"n": n, "width": width, "subset": kind, "seed": seed, "steps": steps[width]}
            yield f"{n} images ({kind}), width {width}, seed {seed}", row


def errors_of(sheet: dict[str, Any], measured: Grid, seeds: int) -> Floats:
    """The errors of the grid, (numbers, widths, seeds, images)."""
    found = {
        (row["n"], row["width"], row["seed"]): row["errors"]
        for row in sheet["runs"].values()
        if row["subset"] == RANDOM
    }
    return np.array(
        [
            [[found[n, width, seed] for seed in range(seeds)] for width in measured.widths]
            for n in measured.numbers
        ]
    )


def main() -> None:
    """Run what is missing, and fit."""
    chosen = options(
        __doc__.splitlines()[0], seconds=0.0, seeds=3, images="cifar10-train.parquet", side=32
    )
    torch.set_num_threads(1)
    measured = grid(chosen)
    dataset = open_data(measured.run(measured.widths[0], seed=0, steps=1))
    pool = max(measured.numbers)
    parts = split(dataset, pool=pool, looks=measured.looks, test=measured.test)
    settings = {"quick": chosen.quick, "seconds": measured.seconds, "side": chosen.side}
    sheet = continued(chosen.json, settings, rows="runs")
    if "steps" not in sheet:
        sheet["steps"] = {str(width): n for width, n in steps_for(measured, parts).items()}
    steps = {int(width): n for width, n in sheet["steps"].items()}
    print("steps", steps, flush=True)
    subsets = Subsets.of(dataset, parts.pool)
    meter = SampleMeter(dataset, parts.test, partial(pooled, extractor("auto")))
    for name, row in planned(measured, chosen.seeds, steps):
        if name not in sheet["runs"]:
            result = trained(measured, parts, row, subsets)
            result |= meter.measure(result.pop("samples"))
            sheet["runs"][name] = result
            print({key: value for key, value in result.items() if key != "errors"}, flush=True)
            if chosen.json is not None:
                chosen.json.write_text(json.dumps(sheet))
    sides = (np.array(values, np.float64) for values in (measured.numbers, measured.widths))
    sheet["fit"] = summary(errors_of(sheet, measured, chosen.seeds), *sides)
    middle = [r for r in sheet["runs"].values() if (r["n"], r["width"]) == measured.middle]
    sheet["others"] = others(middle)
    print(json.dumps({"fit": sheet["fit"], "others": sheet["others"]}, indent=1))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(sheet))


if __name__ == "__main__":
    main()
