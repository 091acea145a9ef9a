"""Tiny models with random weights that are steered by any choice of contexts, and something to ask
of each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato.autoencoders import Pixels
from sfumato.conditioners import (
    AttributesConfig,
    CategoryConfig,
    ConditioningInfo,
    DoodleConfig,
    Holes,
    ImageConfig,
    LearnedTextConfig,
    PointsConfig,
    ReferenceConfig,
    SplatConfig,
)
from sfumato.contexts import ContextConfig
from sfumato.diffusion import Linear, Objective
from sfumato.generation.diffusion_model import SamplingConfig
from sfumato.generation.pipeline import Pipeline
from sfumato.networks import UNetConfig
from sfumato.recipes import Run
from sfumato.runs.preparation import build_model
from sfumato.sampling import DDIM

SIDE = 8
INFO = ConditioningInfo(
    channels=1,
    categories=("cat", "dog", "7"),
    words=("a", "red", "heart", "two", "cats"),
    attributes=("age", "asleep"),
    means=(3.0, 0.5),
    deviations=(2.0, 0.5),
    dimensions=2,
)
CONFIGS = {
    "category": CategoryConfig(size=8),
    "attributes": AttributesConfig(size=8),
    "text": LearnedTextConfig(size=16, layers=1, heads=2, length=9),
    "image": ImageConfig(degradation=Holes()),
    "reference": ReferenceConfig(size=16, side=2),
    "doodle": DoodleConfig(),
    "points": PointsConfig(size=16, heads=2, tokens=3, layers=1, splat=SplatConfig(side=SIDE)),
}


def tiny_pipeline(*names: str, seed: int = 0, lost: object = None) -> Pipeline:
    """A pipeline steered by the contexts of these names, all of them by default; every weight is
    awake.
    """
    configs = {name: CONFIGS[name] for name in names or CONFIGS}
    if lost is not None:
        configs["image"] = ImageConfig(degradation=lost)
    run = Run(
        name="tiny",
        network=UNetConfig(
            channels=32, multipliers=(1, 1), blocks=1, attention_depths=(1,), head_channels=32
        ),
        conditioner=ContextConfig(**configs),
        objective=Objective(schedule=Linear()),
        sampling=SamplingConfig(sampler=DDIM(), steps=3),
        data=_one_channel(),
    )
    model = build_model(run, INFO).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        strength = 0.5 if name.startswith("conditioner") else 0.12
        parameter.copy_(strength * torch.randn(parameter.shape, generator=generator))
    return Pipeline(
        model=model,
        autoencoder=Pixels(1),
        sampling=run.sampling,
        info=INFO,
        image_shape=(1, SIDE, SIDE),
    )


def _one_channel():
    from sfumato.data import DataConfig, Digits

    return DataConfig(source=Digits(), resolution=SIDE, channels=1)


def image(seed: int, *, count: int | None = None, side: int = SIDE) -> Tensor:
    """Random pixels in [0, 1], (1, side, side) or (count, 1, side, side)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, side, side) if count is None else (count, 1, side, side)
    return torch.rand(shape, generator=generator)


def cloud(seed: int, count: int = 12) -> Tensor:
    """Random points in [-1, 1], (count, 2)."""
    return torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# Two different requests for each context.
REQUESTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "category": ({"category": "cat"}, {"category": "dog"}),
    "attributes": ({"attributes": {"age": 7}}, {"attributes": {"age": -2, "asleep": 1}}),
    "text": ({"prompt": "a red heart"}, {"prompt": "two cats"}),
    "image": ({"image": image(1)}, {"image": image(2)}),
    "reference": ({"reference": image(3)}, {"reference": image(4)}),
    "doodle": ({"doodle": image(5)}, {"doodle": image(6)}),
    "points": ({"points": cloud(7)}, {"points": cloud(8)}),
}
