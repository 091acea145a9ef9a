"""The built-in recipes, and the one made for a folder of pictures."""

from __future__ import annotations

import difflib
import io
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from sfumato.conditioners import CategoryConfig
from sfumato.data import DataConfig, Digits, Folder
from sfumato.data.decoding import FORMATS
from sfumato.diffusion import UnitVariance
from sfumato.errors import ConfigError
from sfumato.networks import UNetConfig
from sfumato.pipeline import DenoiserConfig, SamplingConfig
from sfumato.recipes.run import Run
from sfumato.training import AdamWConfig, Budget, CheckpointConfig, PowerEMA, PreviewConfig, ValidationConfig


def digits() -> Run:
    """Handwritten digits, 8 x 8, steered by category: one minute on two cores."""
    return Run(
        name="digits",
        data=DataConfig(source=Digits(), resolution=8, channels=1, holdout=0.15),
        network=UNetConfig(channels=32, multipliers=(1, 2), blocks=1, attention_depths=(1,), head_channels=32),
        conditioner=CategoryConfig(size=64),
        denoiser=DenoiserConfig(input_scale=UnitVariance(0.75)),
        optimizer=AdamWConfig(learning_rate=2e-3),
        batch_size=64,
        budget=Budget(minutes=1),
        validation=ValidationConfig(every_steps=400),
        preview=PreviewConfig(every_steps=200, num=40),
        checkpoint=CheckpointConfig(every_steps=400),
        sampling=SamplingConfig(guidance=1.3, steps=20),
    )


def folder(path: str) -> Run:
    """A folder of pictures: a U-Net sized for the machine, steered by category if there are sub-folders."""
    source = Folder(path)
    entries = source.entries()
    categories = {entry.category for entry in entries if entry.category}
    gpu = torch.cuda.is_available()
    sides, gray = _look(source)
    largest = 64 if gpu else 32
    resolution = max(8, min(largest, int(statistics.median(sides)) // 8 * 8)) if sides else largest
    small = len(entries) < 5000
    return Run(
        name=Path(path).resolve().name or "folder",
        data=DataConfig(source=source, resolution=resolution, channels=1 if gray else 3, workers=2),
        network=UNetConfig(channels=64, multipliers=(1, 2, 2), attention_depths=(2,), dropout=0.1 if small else 0.0),
        conditioner=CategoryConfig() if len(categories) > 1 else None,
        optimizer=AdamWConfig(learning_rate=5e-4, warmup_steps=100),
        ema=PowerEMA(0.1),
        batch_size=64,
        budget=Budget(minutes=60),
        sampling=SamplingConfig(guidance=1.5 if len(categories) > 1 else 1.0),
    )


def _look(source: Folder) -> tuple[list[int], bool]:
    """Shorter sides of up to 100 evenly chosen pictures, and whether all of them are gray."""
    entries = source.entries()
    sides, gray = [], True
    for entry in entries[:: max(1, len(entries) // 100)]:
        try:
            with Image.open(io.BytesIO(entry.read()), formats=FORMATS) as image:
                sides.append(min(image.size))
                gray = gray and image.mode in ("1", "L", "LA", "I;16", "I")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
    return sides, gray and bool(sides)


RECIPES: dict[str, Callable[[], Run]] = {"digits": digits}


def recipe(name: str) -> Run:
    """The built-in recipe of that name.

    Raises:
        ConfigError: naming the nearest, if there is none.
    """
    if name in RECIPES:
        return RECIPES[name]()
    close = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.4)
    hint = f"did you mean `{close[0]}`? " if close else ""
    raise ConfigError(
        f"{name!r} is no recipe, YAML file or folder",
        where="train",
        mend=f"{hint}`sfumato recipes` lists the built-in ones; a folder or file must exist",
    )
