"""Seconds of an evaluation without sampling: 5,000 images beside 5,000 training images and 1,000
held-out ones at 32 pixels, features of the real images not yet cached.

    PYTHONPATH=. python benchmarks/evaluation.py cifar10-train.parquet [--quick] [--json FILE]
"""

from __future__ import annotations

import itertools
import resource
import sys
import time
from pathlib import Path

from machine import machine, options, report

from sfumato.data import DataConfig, Parquet, index, to_float
from sfumato.data.copies import CopyIndex
from sfumato.evaluation.extractors import extractor
from sfumato.evaluation.memorization import CopyMeter
from sfumato.evaluation.quality import QualityMeter
from tests.helpers.image_sets import dataset_of


def main() -> None:
    """Measure, and print the parts."""
    path = Path(sys.argv.pop(1))
    asked = options(__doc__.splitlines()[0], count=5_000, held_out=1_000)
    count = 500 if asked.quick else asked.count
    everything = index(DataConfig(source=Parquet(str(path)), resolution=32))
    chosen = everything.training[: 2 * count + asked.held_out]
    pixels = everything.images(chosen).pixels.numpy()
    dataset = dataset_of(pixels[:count], pixels[count : count + asked.held_out])
    samples = to_float(everything.images(chosen[-count:]).pixels)
    marks = {"start": time.perf_counter()}
    network = extractor("auto")
    copies = CopyMeter(CopyIndex.of(dataset), features=network)
    marks["index"] = time.perf_counter()
    quality = QualityMeter(dataset, network, training=dataset.training, held_out=dataset.holdout)
    quality.measure_held_out()
    marks["features of real images"] = time.perf_counter()
    found = quality.measure(samples)
    marks["quality of samples"] = time.perf_counter()
    memorized = copies.measure(samples)
    copies.measure(to_float(dataset.images(dataset.holdout).pixels))
    marks["copies"] = time.perf_counter()
    names = list(marks)
    parts = {name: marks[name] - marks[before] for before, name in itertools.pairwise(names)}
    report(
        {
            "machine": machine(),
            "extractor": network.name,
            "seconds": {**parts, "total": sum(parts.values())},
            "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "kid": found.kid_held_out.plain(),
            "copies": memorized.copies.plain(),
        },
        asked.json,
    )


if __name__ == "__main__":
    main()
