"""The built-in recipes, each a function that returns a Run."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from sfumato.conditioners import CategoryConfig
from sfumato.data import DataConfig, Digits
from sfumato.diffusion import UnitVariance
from sfumato.errors import ConfigError
from sfumato.networks import UNetConfig
from sfumato.pipeline import DenoiserConfig, SamplingConfig
from sfumato.recipes.run import Run
from sfumato.training import AdamWConfig, Budget, CheckpointConfig, PreviewConfig, ValidationConfig


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
