"""Preservation: while new images are learned, the model keeps predicting what its base predicts for
contexts that the base knew before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from sfumato import randomness
from sfumato.adapters import BaseOf
from sfumato.condition import ContextValues, reorder, to_device
from sfumato.config.bounds import NonNegative
from sfumato.diffusion import NoiseLevel, Objective
from sfumato.generation.diffusion_model import Model


@dataclass(frozen=True, kw_only=True)
class PreservationConfig:
    """A loss that keeps what the base knew. Noisy training images are shown under contexts that
    the base knows and the new images do not have, and the prediction is drawn to that of the base.
    No other images are needed.

    Attributes:
        weight: of the loss.
        prompts: texts that stand for what the base knows, for models that read text; [] for a
            built-in list.

    Source: with the model's own earlier outputs as targets: Li & Hoiem 2016 (arXiv:1606.09282).
    """

    weight: NonNegative = 1.0
    prompts: tuple[str, ...] = ()


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


class Preservation:
    """The loss of `PreservationConfig`."""

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
