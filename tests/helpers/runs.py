"""A run so small that it trains in a second, and what it takes to compare two of them bit for
bit.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image

from sfumato.conditioners import CategoryConfig
from sfumato.contexts import ContextConfig
from sfumato.data import AugmentConfig, DataConfig, Folder
from sfumato.generation import SamplingConfig
from sfumato.networks import UNetConfig
from sfumato.recipes import Run
from sfumato.storage import checkpoint
from sfumato.training import (
    Budget,
    CheckpointConfig,
    LogConfig,
    OptimizerConfig,
    PreviewConfig,
    ValidationConfig,
)


def images(folder: Path, count: int = 40, size: int = 8) -> Path:
    """Random gray images in two categories."""
    generator = np.random.default_rng(0)
    for number in range(count):
        path = folder / ("even" if number % 2 == 0 else "odd") / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (size, size), np.uint8)).save(path)
    return folder


def tiny_run(folder: Path, **changes) -> Run:
    """Mid-epoch checkpoints, accumulation, dropout, flips: everything whose state could be lost."""
    settings = {
        "name": "tiny",
        "data": DataConfig(
            source=Folder(str(folder)),
            resolution=8,
            channels=1,
            augment=AugmentConfig(flip="horizontal"),
        ),
        "network": UNetConfig(
            channels=16,
            multipliers=(1, 1),
            blocks=1,
            attention_depths=(1,),
            head_channels=16,
            dropout=0.1,
        ),
        "conditioner": ContextConfig(category=CategoryConfig(size=8)),
        "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=3),
        "batch_size": 8,
        "micro_batch": 5,
        "precision": "float32",
        "budget": Budget(steps=14),
        "log": LogConfig(every_steps=1),
        "checkpoint": CheckpointConfig(every_steps=5, keep=2),
        "validation": ValidationConfig(every_steps=4, samples=10, copy_samples=0),
        "preview": PreviewConfig(every_steps=7, num=2),
        "sampling": SamplingConfig(steps=4),
    }
    return Run(**{**settings, **changes})


def fingerprint(run: Path) -> dict[str, str]:
    """Hashes of the last checkpoint's weights, average and optimizer, and of the list of losses."""
    newest = checkpoint.paths(run / "checkpoints")[0]
    hashes = {
        path.stem: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in newest.glob("*.safetensors")
    }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
    figures = [
        (line["step"], line["validation/ema/eps_mse"])
        for line in lines
        if "validation/ema/eps_mse" in line
    ]
    return {**hashes, "step": newest.name, "losses": str(losses), "validation": str(figures)}
