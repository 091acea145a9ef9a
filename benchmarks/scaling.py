"""What training costs as batches, pictures and networks grow: images/s, and the share of the machine's measured peak.

    python benchmarks/scaling.py [--quick] [--rounds 3] [--json FILE]

One thing grows at a time, from a common point: 32 x 32, batch 32, the default U-Net and DiT-S/2. One process, one rank.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import flops, interleaved, machine, options, peaks, report
from train_step import NETWORK, our_trainer

from sfumato.data import Batch, Part
from sfumato.networks import DiTConfig, NetworkConfig

DIT = DiTConfig(channels=384, layers=12)
POINTS: dict[str, tuple[NetworkConfig, int, int]] = {  # name -> network, side, batch
    **{f"U-Net, batch {batch}": (NETWORK, 32, batch) for batch in (8, 32, 128)},
    **{f"U-Net, {side} px": (NETWORK, side, 32) for side in (16, 64)},
    **{f"U-Net, {width} channels": (replace(NETWORK, channels=width), 32, 32) for width in (32, 128)},
    **{f"DiT-S/2, batch {batch}": (DIT, 32, batch) for batch in (8, 32, 128)},
    **{f"DiT-S/2, {side} px": (DIT, side, 32) for side in (16, 64)},
    "DiT-B/2": (replace(DIT, channels=768), 32, 32),
}


def main() -> None:
    """Each point by itself: together they would not fit."""
    asked = options(__doc__.splitlines()[0], rounds=3)
    rounds, peak = (1 if asked.quick else asked.rounds), peaks()
    limit = max(peak["matmul_gflops"], peak["convolution_gflops"])
    rows: dict[str, Any] = {}
    for name, (network, side, batch) in POINTS.items():
        if asked.quick and batch * side**2 > 16 * 32**2:
            continue
        with tempfile.TemporaryDirectory() as folder:
            trainer = our_trainer(side, batch, Path(folder), "bfloat16", network)
            images = torch.rand(batch, 3, side, side) * 2 - 1
            given = Batch(parts=[Part(first=0, images=images, context={})])
            work = flops(lambda: trainer.train_step(given))  # noqa: B023
            taken = statistics.median(interleaved({name: lambda: trainer.train_step(given)}, rounds)[name])  # noqa: B023
        rows[name] = {
            "images_per_s": batch / taken,
            "gflop_per_image": work / batch / 1e9,
            "gflops": work / taken / 1e9,
            "of_peak": work / taken / 1e9 / limit,
        }
        print(name, rows[name], flush=True)
    report({"machine": machine(), "rounds": rounds, "peak": peak, "ours": rows}, asked.json)


if __name__ == "__main__":
    main()
