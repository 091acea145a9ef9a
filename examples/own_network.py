"""A network of your own: any nn.Module, wrapped in a few lines, trains like the built-in ones.

    python examples/own_network.py

`TinyResNet` knows nothing of sfumato. `WrappedResNet` adapts it: it derives from `Backbone` and
calls it in `forward`. `TinyResNetConfig` makes it a choice in configurations: in the run's
config.yaml it is `network.kind: tiny-res-net`. Whoever loads the run imports this module first.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

import sfumato
from sfumato.condition import NO_CONTEXT
from sfumato.data import index
from sfumato.evaluation import adherence_table, measure_adherence
from sfumato.evaluation.classifier import train_classifier
from sfumato.networks import Backbone, NetworkConfig
from sfumato.training import Budget, PreviewConfig, ValidationConfig


class TinyResNet(nn.Module):
    """Residual convolutions on images, each of them shifted by an embedding (B, E)."""

    def __init__(self, channels: int, embedding: int, width: int, depth: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.shifts = nn.ModuleList(nn.Linear(embedding, width) for _ in range(depth))
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 5, padding=2) for _ in range(depth))
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for shift, block in zip(self.shifts, self.blocks, strict=True):
            x = x + block(torch.relu(x + shift(embedding)[:, :, None, None]))
        return self.last(x)


class WrappedResNet(Backbone):
    def __init__(self, config, *, image_channels, context):
        super().__init__(image_channels=image_channels, context=context)
        embedding = 1 + context.vector  # the noise level, and what the image is steered by
        self.inner = TinyResNet(image_channels, embedding, config.width, config.depth)

    def forward(self, x, noise_input, condition):
        return self.inner(x, torch.cat([noise_input[:, None], condition.vector], dim=1))


@dataclass(frozen=True, kw_only=True)
class TinyResNetConfig(NetworkConfig):
    width: int = 32
    depth: int = 3

    def build(self, *, image_channels, context=NO_CONTEXT):
        return WrappedResNet(self, image_channels=image_channels, context=context)


run = replace(
    sfumato.recipe("digits"),  # steered by the digit's category, a vector of 64 numbers
    name="own-network",
    network=TinyResNetConfig(depth=4),
    batch_size=32,
    budget=Budget(steps=40),
    preview=PreviewConfig(num=4),
    validation=ValidationConfig(samples=50),
)
path = sfumato.train(run)  # runs/own-network
sfumato.resume(path, overrides=["budget.steps=120"])  # goes on where it ended

pipeline = sfumato.load(path)
images = pipeline.sample(10, category=list("0123456789"))
print(f"samples of {type(pipeline.model.network).__name__}: {tuple(images.shape)}")

dataset = index(run.data)
classifier = train_classifier(dataset, dataset.training, steps=80)
print(adherence_table(measure_adherence(pipeline, dataset, classifier=classifier, num=50)))
