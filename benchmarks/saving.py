"""How long training stands still for a checkpoint, beside writing it at once, and how fast steps are
while a thread writes it.

    python benchmarks/saving.py [--quick] [--json FILE] [--place FOLDER]

The state is 302 MB: 19 million weights, their average and two moments.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from machine import machine, options, report

from sfumato.storage import checkpoint
from sfumato.training.saving import BackgroundWriter

STEP = 512  # side of the products that stand for training


def groups() -> dict[str, dict[str, torch.Tensor]]:
    """Return tensors of a checkpoint."""
    return {
        name: {f"layer{number}.weight": torch.randn(512, 512) for number in range(72 * size)}
        for name, size in (("model", 1), ("ema", 1), ("optimizer", 2))
    }


def steps(seconds: float) -> float:
    """Return how many steps a second are taken."""
    a, done, begun = torch.randn(STEP, STEP), 0, time.perf_counter()
    while (passed := time.perf_counter() - begun) < seconds:
        for _ in range(4):
            torch.mm(a, a)
        done += 1
    return done / passed


def main() -> None:
    """Measure in interleaved rounds."""
    asked = options(__doc__.splitlines()[0], place=tempfile.gettempdir())
    rounds, root = 3 if asked.quick else 9, Path(tempfile.mkdtemp(dir=asked.place))
    tensors, writer = groups(), BackgroundWriter()
    stalls, at_once, alone, beside, lasted = [], [], [], [], []
    try:
        for number in range(rounds):
            begun = time.perf_counter()
            checkpoint.save(root, step=2 * number, state={}, tensors=tensors, keep=1)
            at_once.append(time.perf_counter() - begun)
            alone.append(steps(2.0))
            begun = time.perf_counter()
            save = partial(checkpoint.save, root, step=2 * number + 1, state={}, keep=1)
            writer.begin(lambda copies, save=save: save(tensors=copies), tensors)
            stalls.append(time.perf_counter() - begun)
            beside.append(steps(2.0))
            writer.wait()
            lasted.append(time.perf_counter() - begun)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    figures = {
        name: {"median": statistics.median(values), "most": max(values)}
        for name, values in (
            ("stall_s", stalls),
            ("at_once_s", at_once),
            ("steps_per_s_alone", alone),
            ("steps_per_s_beside", beside),
            ("until_written_s", lasted),
        )
    }
    mib = sum(value.nbytes for group in tensors.values() for value in group.values()) / 1e6
    report({"machine": machine(), "megabytes": mib, "rounds": rounds, **figures}, asked.json)


if __name__ == "__main__":
    main()
