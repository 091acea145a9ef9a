"""Memory of training: bytes for each parameter, bytes for each image, and the batch that fits.

    python benchmarks/memory.py [--quick] [--side 32] [--budget 8] [--json FILE]

Each figure is a fresh process whose peak is read at its end (resident memory on a CPU, allocated
memory on a GPU). A line through two
batches tells what an image costs and what there is before the first one; --budget GiB then tells
the batch that fits.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import machine, options, report
from train_step import our_trainer

from sfumato.data import Batch, ShapeGroup
from sfumato.networks import DiTConfig, NetworkConfig, UNetConfig

DIT_S, DIT_B = DiTConfig(hidden_size=384, depth=12), DiTConfig(hidden_size=768, depth=12)
NETWORKS: dict[str, NetworkConfig] = {
    "U-Net 64 (1, 2, 2)": UNetConfig(channels=64, multipliers=(1, 2, 2), attention_depths=(2,)),
    "DiT-S/2": DIT_S,
    "DiT-S/2, recomputed": replace(DIT_S, activation_checkpointing=True),
    "DiT-B/2": DIT_B,
}


def peak(name: str, side: int, batch: int) -> dict[str, float]:
    """Peak bytes of a process that takes two steps, what it held before it built anything, and its
    parameters.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with tempfile.TemporaryDirectory() as folder:
        trainer = our_trainer(side, batch, Path(folder), "bfloat16", NETWORKS[name])
        images = torch.rand(batch, 3, side, side) * 2 - 1
        for _ in range(2):
            trainer.train_step(
                Batch(
                    first=0,
                    size=len(images),
                    groups=[ShapeGroup(first=0, images=images, context={})],
                )
            )
        size = sum(p.numel() for p in trainer.state.model.parameters())
    if torch.cuda.is_available():
        return {"peak": torch.cuda.max_memory_allocated(), "before": 0, "parameters": size}
    return {
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "before": before,
        "parameters": size,
    }


def measured(name: str, side: int, batch: int) -> dict[str, float]:
    """The same in a fresh process."""
    command = [sys.executable, __file__, "--one", name, "--side", str(side), "--batch", str(batch)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(said.strip().splitlines()[-1])


def main() -> None:
    """Two batches of each network."""
    asked = options(__doc__.splitlines()[0], side=32, budget=8.0, batch=0, one="")
    if asked.one:
        print(json.dumps(peak(asked.one, asked.side, asked.batch)))
        return
    few, many = (2, 4) if asked.quick else (8, 40)
    rows: dict[str, Any] = {}
    for name in list(NETWORKS)[: 2 if asked.quick else None]:
        low, high = measured(name, asked.side, few), measured(name, asked.side, many)
        each = (high["peak"] - low["peak"]) / (many - few)
        fixed = low["peak"] - few * each - low["before"]
        rows[name] = {
            "parameters": low["parameters"],
            "bytes_per_parameter": fixed / low["parameters"],
            "mib_per_image": each / 2**20,
            "batch_that_fits": int((asked.budget * 2**30 - fixed - low["before"]) / each),
        }
        print(name, json.dumps(rows[name]), flush=True)
    report(
        {"machine": machine(), "side": asked.side, "budget_gib": asked.budget, "ours": rows},
        asked.json,
    )


if __name__ == "__main__":
    main()
