"""The built-in recipes, each a function that returns a Run."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from sfumato.conditioners import CategoryConfig
from sfumato.data import DataConfig, Digits, Emoji
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


def emoji() -> Run:
    """OpenMoji's pictures at 32 x 32, steered by fifteen categories; whole combinations of profession and skin tone held out."""
    return Run(
        name="emoji",
        data=DataConfig(source=Emoji(size=64), resolution=32),
        network=UNetConfig(channels=64, multipliers=(1, 2, 2), attention_depths=(2,), dropout=0.1),
        conditioner=CategoryConfig(),
        optimizer=AdamWConfig(learning_rate=5e-4, warmup_steps=100),
        ema=PowerEMA(0.1),
        batch_size=64,
        budget=Budget(minutes=45),
        sampling=SamplingConfig(guidance=1.5),
    )


RECIPES: dict[str, Callable[[], Run]] = {"digits": digits, "emoji": emoji}


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
