"""What training costs as batches, images and networks grow: images/s, and the share of the
machine's measured peak.

    python benchmarks/scaling.py [--quick] [--rounds 3] [--only NAME] [--json FILE]

One thing grows at a time, from a common point: 32 x 32, batch 32, the default U-Net and DiT-S/2.
And what a batch of several shapes costs,
which goes through the network a shape at a time: buckets give whole batches of one shape but for a
few mixed ones at an epoch's end. One
process, one rank.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import flops, interleaved, machine, options, peaks, report
from train_step import NETWORK, our_trainer

from sfumato.data import Batch, ShapeGroup
from sfumato.networks import DiTConfig, NetworkConfig

DIT = DiTConfig(hidden_size=384, depth=12)
# as buckets have them: nearly one area, 240 to 256 patches
SHAPES = ((32, 32), (24, 40), (40, 24), (28, 36))
# name -> network, shapes, batch
POINTS: dict[str, tuple[NetworkConfig, tuple[tuple[int, int], ...], int]] = {
    **{f"U-Net, batch {batch}": (NETWORK, SHAPES[:1], batch) for batch in (8, 32, 128)},
    **{f"U-Net, {side} px": (NETWORK, ((side, side),), 32) for side in (16, 64)},
    **{
        f"U-Net, {width} channels": (replace(NETWORK, channels=width), SHAPES[:1], 32)
        for width in (32, 128)
    },
    "U-Net, four shapes": (NETWORK, SHAPES, 32),
    **{f"DiT-S/2, batch {batch}": (DIT, SHAPES[:1], batch) for batch in (8, 32, 128)},
    **{f"DiT-S/2, {side} px": (DIT, ((side, side),), 32) for side in (16, 64)},
    "DiT-S/2, four shapes": (DIT, SHAPES, 32),
    "DiT-B/2": (replace(DIT, hidden_size=768), SHAPES[:1], 32),
}


def batch_of(shapes: tuple[tuple[int, int], ...], size: int) -> Batch:
    """`size` images, as many of each shape."""
    each = size // len(shapes)
    parts = [
        ShapeGroup(first=number * each, images=torch.rand(each, 3, *shape) * 2 - 1, context={})
        for number, shape in enumerate(shapes)
    ]
    return Batch(first=0, size=sum(map(len, parts)), groups=parts)


def main() -> None:
    """Each point by itself: together they would not fit."""
    asked = options(__doc__.splitlines()[0], rounds=3, only="")
    rounds, peak = (1 if asked.quick else asked.rounds), peaks()
    limit = max(peak["matmul_gflops"], peak["convolution_gflops"])
    rows: dict[str, Any] = {}
    for name, (network, shapes, batch) in POINTS.items():
        side = max(shapes[0])
        if asked.only not in name or (asked.quick and batch * side**2 > 16 * 32**2):
            continue
        with tempfile.TemporaryDirectory() as folder:
            trainer = our_trainer(side, batch, Path(folder), "bfloat16", network)
            given = batch_of(shapes, batch)
            work = flops(partial(trainer.train_step, given))
            step = partial(trainer.train_step, given)
            taken = statistics.median(interleaved({name: step}, rounds)[name])
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
