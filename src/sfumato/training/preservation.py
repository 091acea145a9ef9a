"""Preservation: while new images are learned, the model keeps predicting what its base predicts for
contexts that the base knew before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from sfumato import randomness
from sfumato.adapters import BaseOf
from sfumato.condition import ContextValues, reorder, to_device
from sfumato.config.bounds import CountOrZero, NonNegative
from sfumato.diffusion import NoiseLevel, Objective
from sfumato.errors import ConfigError
from sfumato.generation.diffusion_model import Model


@dataclass(frozen=True, kw_only=True)
class PreservationConfig:
    """A loss that keeps what the base knew. Noisy training images are shown under contexts that
    the base knows and the new images do not have, and the prediction is drawn to that of the base.
    No other images are needed. With `source` or `num`, the training loss of prior images takes its
    place, as in DreamBooth.

    Attributes:
        weight: of the loss.
        prompts: texts that stand for what the base knows, for models that read text; [] for a
            built-in list.
        source: images of what the base knows, such as a folder, with their captions or, without
            one, a prompt; "" for none.
        num: how many such images the base makes under the prompts before training; 0 for none.

    Source: with the model's own earlier outputs as targets: Li & Hoiem 2016 (arXiv:1606.09282);
        prior images: Ruiz et al. 2023 (arXiv:2208.12242), eq. 2.
    """

    weight: NonNegative = 1.0
    prompts: tuple[str, ...] = ()
    source: str = ""
    num: CountOrZero = 0

    def __post_init__(self) -> None:
        if self.source and self.num:
            raise ConfigError(
                f"num = {self.num}, and source = {self.source}",
                where="preservation",
                hint="images are given (source) or made (num): set one of the two",
            )

    @property
    def has_images(self) -> bool:
        """Whether it needs prior images."""
        return bool(self.source or self.num)


@dataclass(frozen=True, kw_only=True)
class KnownContexts:
    """Values of contexts that a base knows, and how the base is had back.

    Attributes:
        values: `count` of each context, by its name.
        base_of: see `sfumato.adapters.Adapter.base_of`.
    """

    values: ContextValues
    count: int
    base_of: BaseOf


class PreservationLoss(ABC):
    """A loss that keeps what a base knew, beside that of the new images.

    Attributes:
        weight: of the loss.
        digest: a hash of the images that it needs; "" if it needs none.
    """

    weight: float
    digest: str = ""

    @abstractmethod
    def loss(self, model: Model, x0: Tensor, *, first: int, dtype: torch.dtype) -> Tensor:
        """Return one value for each new sample, (B,), keyed by their numbers.

        Args:
            x0: new images or their latents (B, C, H, W).
            first: number of the first sample.
            dtype: precision inside the network.
        """


class Preservation(PreservationLoss):
    """The squared distance to the base's predictions, on the new images."""

    def __init__(
        self, config: PreservationConfig, known: KnownContexts, objective: Objective, *, seed: int
    ) -> None:
        self.weight, self._known, self._objective, self._seed = (
            config.weight,
            known,
            objective,
            seed,
        )

    def loss(self, model: Model, x0: Tensor, *, first: int, dtype: torch.dtype) -> Tensor:
        """Return the squared distance between the predictions of the model and of its base, (B,).

        Levels, noises and contexts are keyed by the samples' numbers, `first` and following.

        Args:
            x0: training images or their latents (B, C, H, W).
        """
        count, device = len(x0), x0.device
        draws = randomness.uniform(self._seed, "preservation", first=first, count=count, per_item=2)
        level = self._objective.levels(draws[:, 0])
        level = NoiseLevel(*(value.float().to(device) for value in level))
        noise = randomness.normal(
            self._seed, "preservation/noise", first=first, shape=tuple(x0.shape), device=device
        )
        numbers = (draws[:, 1] * self._known.count).long().tolist()
        context = to_device(reorder(self._known.values, numbers), device)
        x = level.mix(x0, noise)
        with torch.no_grad(), self._known.base_of(model) as module, _evaluating(module):
            base = cast(Model, module)
            target = base.denoiser(dtype).predict(x, level, base.conditioner(context, count))
        output = model.denoiser(dtype).predict(x, level, model.conditioner(context, count))
        return (output - target).square().flatten(1).mean(1)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off within the block."""
    training = module.training
    try:
        module.eval()
        yield
    finally:
        module.train(training)
