"""A small classifier trained on the labelled images of the run.

It classifies samples, and its last hidden layer is a feature space.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato import randomness
from sfumato.data import Dataset, to_float

EPOCHS = 200  # enough for a small set
MIN_STEPS, MIN_BATCH_SIZE = 100, 16


class _Network(nn.Module):
    """Convolutions down to at most 2 x 2, then 64 features."""

    def __init__(self, image_shape: tuple[int, int, int], categories: int) -> None:
        super().__init__()
        channels, *sides = image_shape
        layers: list[nn.Module] = [nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU()]
        width = 32
        # convolutions at high resolution would take most of the time without improving accuracy
        while max(sides) > 16:
            layers.append(_halve(sides))
        while max(sides) > 2:
            next_width = min(2 * width, 128)
            layers += [nn.Conv2d(width, next_width, 3, padding=1), nn.ReLU(), _halve(sides)]
            width = next_width
        self.features = nn.Sequential(
            *layers,
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(width * math.prod(sides), 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, categories)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.features(x))
        return result


def _halve(sides: list[int]) -> nn.Module:
    """Return a layer that halves sides longer than 2, and replace `sides` by what it leaves."""
    factors = tuple(2 if side > 2 else 1 for side in sides)
    sides[:] = [side // factor for side, factor in zip(sides, factors, strict=True)]
    return nn.MaxPool2d(factors)


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A trained classifier with its accuracy on held-out images; NaN if none has a category."""

    network: nn.Module
    held_out_accuracy: float
    name: str

    @torch.no_grad()
    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the category (N,) and the features (N, 64), in float64, of images in [-1, 1]."""
        network: Any = self.network
        parts = [(network(part).argmax(1), network.features(part)) for part in images.split(256)]
        return torch.cat([labels for labels, _ in parts]), torch.cat(
            [features for _, features in parts]
        ).double()


def select_labelled(dataset: Dataset, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return those of `positions` whose images have a category."""
    result: NDArray[np.int64] = positions[
        (dataset.labels[torch.from_numpy(positions)] >= 0).numpy()
    ]
    return result


def train_classifier(
    dataset: Dataset,
    positions: NDArray[np.int64],
    *,
    seed: int = 0,
    steps: int = 1500,
    batch_size: int = 64,
    on_progress: Callable[[float], None] | None = None,
) -> Classifier:
    """Train on the images at `positions` that have a category, and test on such held-out images.

    Noise and label smoothing keep it from becoming overconfident.

    Args:
        steps, batch_size: upper limits; both are smaller for a small set, to train for about 200
            epochs.
        on_progress: called with the fraction of the steps that are done.
    """
    positions, held_out = (
        select_labelled(dataset, part)
        for part in (positions, dataset.with_common_shape(dataset.holdout))
    )
    batch_size = min(batch_size, max(MIN_BATCH_SIZE, len(positions)))
    steps = min(steps, max(MIN_STEPS, EPOCHS * len(positions) // batch_size))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Network(dataset.image_shape, len(dataset.categories))
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01, fused=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        for step in range(steps):
            chosen = randomness.uniform(
                seed, "classifier", first=step, count=1, per_item=batch_size
            )[0]
            batch = positions[(chosen * len(positions)).long().numpy()]
            images = to_float(dataset.images(batch)[0])
            noisy = images + 0.1 * torch.randn_like(images)
            loss = F.cross_entropy(
                network(noisy), dataset.context(batch)["category"], label_smoothing=0.05
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if on_progress is not None:
                on_progress((step + 1) / steps)
    network.eval().requires_grad_(False)
    classifier = Classifier(
        network=network, held_out_accuracy=0.0, name=f"run-classifier-seed{seed}-n{len(positions)}"
    )
    if not len(held_out):
        return replace(classifier, held_out_accuracy=math.nan)
    predicted, _ = classifier.predict(to_float(dataset.images(held_out)[0]))
    accuracy = float((predicted == dataset.context(held_out)["category"]).double().mean())
    return replace(classifier, held_out_accuracy=accuracy)
