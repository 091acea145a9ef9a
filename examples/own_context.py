"""A context of your own: steer a model by the brightness of the image.

    python examples/own_context.py

A context has a config, a conditioner (a module that turns values into a network's `Condition`) and
a `Context` that ties both to configurations, `Pipeline.sample`, previews and evaluations. Here the
values are made from the training images. Whoever loads the run registers the context first.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import sfumato
from sfumato.condition import Condition, ContextSizes
from sfumato.conditioners import Conditioner
from sfumato.config.bounds import Fraction, Size
from sfumato.contexts import Context, register
from sfumato.data import index
from sfumato.evaluation import adherence_table, measure_adherence


def brightness(images: Tensor) -> Tensor:
    """Mean of each image (n, C, H, W) in [-1, 1], stretched: digits have 0.2 to 0.8, about."""
    return 2.5 * images.mean((1, 2, 3)) + 1.5


@dataclass(frozen=True, kw_only=True)
class BrightnessConfig:
    size: Size = 16  # of the vector that the network gets
    dropout: Fraction = 0.1  # share of training images that do not say how bright they are


class BrightnessConditioner(Conditioner):
    def __init__(self, config: BrightnessConfig) -> None:
        super().__init__()
        self.sizes, self.dropout = ContextSizes(vector=config.size), config.dropout
        self.embedding = nn.Linear(2, config.size)  # of the value, and of whether it is known

    def forward(self, context, batch_size):
        if "brightness" not in context:
            return self.null(batch_size)
        value = context["brightness"].to(self.embedding.weight)
        known = torch.stack([4 * value - 2, torch.ones_like(value)], dim=1)
        return Condition(vector=self.embedding(known))

    def null(self, batch_size):
        return Condition(vector=self.embedding(self.embedding.weight.new_zeros(batch_size, 2)))

    def training_context(self, images, context, *, seed, first):
        return {"brightness": brightness(images)}


class Brightness(Context):
    name, config, derived_from_images = "brightness", BrightnessConfig, True

    def build(self, config, info, encoder):
        return BrightnessConditioner(config)

    def parse(self, value, request):  # what `sample` is given, for all images that it makes
        return torch.full((request.num,), value)

    def words(self, values, info):  # in samples.json beside a preview
        return [f"{value:.2f}" for value in values.tolist()]

    def metrics(self, inputs):
        target = inputs.values
        return {"error": ("lower", lambda images, i: (brightness(images) - target[i]).abs())}


register(Brightness())  # `conditioner.brightness` and `pipeline.sample(brightness=...)` exist now
changes = ["name=own-context", "conditioner.category=null", "conditioner.brightness.size=8"]
small = ["network.channels=16", "network.multipliers=[1]", "network.attention_depths=[]"]
short = ["batch_size=16", "budget.steps=100", "preview.num=10", "validation.samples=50"]
run = sfumato.resolve("digits", [*changes, *small, *short])
pipeline = sfumato.load(sfumato.train(run))
dark, bright = (brightness(2 * pipeline.sample(16, brightness=b) - 1).mean() for b in (0.2, 0.8))
print(f"brightness of samples: {dark:.2f} where 0.2 is requested, {bright:.2f} where it is 0.8")
print(adherence_table(measure_adherence(pipeline, index(run.data), classifier=None, num=100)))
