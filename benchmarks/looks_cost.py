"""What share of a run its looks take: errors on held-out and on training images, and searches for
copies among samples.

    python benchmarks/looks_cost.py cifar10-train.parquet [--quick] [--json FILE] [--sizes 60,1000,50000]
        [--minutes 10]

Each run trains a U-Net at 32 pixels for the same minutes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
from machine import machine, options, report

from sfumato.data import DataConfig, Parquet
from sfumato.networks import UNetConfig
from sfumato.recipes.run import Run
from sfumato.runs import train
from sfumato.storage import checkpoint
from sfumato.training import Budget
from sfumato.training.looks import FREE_S, SHARE


def run_of(source: Path, minutes: float) -> Run:
    """A run whose validation and previews are rare, so that looks come by views alone."""
    return Run(
        name="looks",
        data=DataConfig(source=Parquet(str(source)), resolution=32),
        network=UNetConfig(channels=32, multipliers=(1, 2), blocks=1, attention_depths=(1,)),
        batch_size=32,
        budget=Budget(minutes=minutes),
    )


def measured(images: Path, size: int, minutes: float) -> dict[str, Any]:
    """Train on the first images, and return what looks took."""
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "images.parquet"
        parquet.write_table(parquet.read_table(images).slice(0, size), source)
        folder = train(run_of(source, minutes), run=Path(place) / "run")
        counters = checkpoint.read_newest(folder / "checkpoints")[0].state["counters"]
        looks = [json.loads(line) for line in (folder / "looks.jsonl").read_text().splitlines()]
    return {
        "seconds": counters["seconds"],
        "looks_s": counters["looks_s"],
        "share": counters["looks_s"] / counters["seconds"],
        "allowed_s": max(FREE_S, SHARE * counters["seconds"]),
        "looks": len(looks),
        "views": looks[-1]["views"],
        "searches": {look["step"]: look["copies"] for look in looks if look["copies"]},
        "figures": sorted(looks[-1]["samples"]),
    }


def main() -> None:
    """Measure each size."""
    images = Path(sys.argv.pop(1))
    asked = options(__doc__.splitlines()[0], sizes="60,1000,50000", minutes=10.0)
    rows = {}
    for size in map(int, asked.sizes.split(",")):
        rows[size] = measured(images, size, 0.5 if asked.quick else asked.minutes)
        print(size, rows[size], flush=True)
    report({"machine": machine(), "sizes": rows}, asked.json)


if __name__ == "__main__":
    main()
