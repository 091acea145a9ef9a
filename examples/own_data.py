"""Data of your own: a source lists encoded images and what is known of them; sfumato does the rest.

    python examples/own_data.py

`Discs` draws its images. A real source would name files (`sfumato.data.File`), and read a database
or an annotation format. What it lists is decoded, checked for duplicates, split into training and
held-out images, and cached. In the run's config.yaml it is `data.source.kind: discs`.
"""

import io
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

import sfumato
from sfumato.conditioners import AttributesConfig
from sfumato.contexts import ContextConfig
from sfumato.data import DataConfig, Entry, Inline, Listing, Source, index
from sfumato.evaluation import evaluate
from sfumato.networks import UNetConfig
from sfumato.training import Budget, PreviewConfig, ValidationConfig


@dataclass(frozen=True)
class Discs(Source):
    """Gray discs on black, 8 x 8, each with its radius as an attribute."""

    num: int = 200

    def listing(self) -> Listing:
        entries = []
        numbers = np.random.default_rng(0).random((self.num, 4))
        for number, (x, y, radius, gray) in enumerate(numbers):
            x, y, radius = 2 + 4 * x, 2 + 4 * y, 1 + 2 * float(radius)
            image, buffer = Image.new("L", (8, 8)), io.BytesIO()
            box = (x - radius, y - radius, x + radius, y + radius)
            ImageDraw.Draw(image).ellipse(box, fill=155 + int(100 * gray))
            image.save(buffer, "PNG")
            png = Inline(buffer.getvalue())
            entries.append(Entry(name=str(number), image=png, attributes=(("radius", radius),)))
        return Listing(entries=entries, unit="images")


run = replace(
    sfumato.recipe("digits"),
    name="own-data",
    data=DataConfig(source=Discs(), resolution=8, channels=1),
    network=UNetConfig(channels=16, multipliers=(1,), blocks=1, attention_depths=()),
    conditioner=ContextConfig(attributes=AttributesConfig(size=16)),
    batch_size=16,
    budget=Budget(steps=30),
    preview=PreviewConfig(num=9),
    validation=ValidationConfig(samples=30),
)
path = sfumato.train(run)  # runs/own-data; samples/real.png in it shows the images
sfumato.resume(path, overrides=["budget.steps=90"])

pipeline = sfumato.load(path)
small, large = (pipeline.sample(16, attributes={"radius": radius}) for radius in (1.2, 2.8))
print(f"mean brightness: {small.mean():.3f} with radius 1.2, {large.mean():.3f} with radius 2.8")

figures = evaluate(pipeline, index(run.data, annotations=run.conditioner.names), num=20)
for row in figures.rows:
    nearest = row.memorization.nearest
    if nearest is not None:
        print(f"{row.name}: distance to the nearest training image {nearest.value:.2f}")
