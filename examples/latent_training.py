"""Diffusion in the latents of an autoencoder, which is trained first and on the same images.

    python examples/latent_training.py

The autoencoder makes images four times smaller along each side, so that the diffusion model works
on 4 x 4 latents in place of 16 x 16 pixels. The run holds both stages: `train`, `resume`, `load`
and `sample` treat it like any other. With budgets as small as these, samples are blurred.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import sfumato
from sfumato.autoencoders import KLConfig
from sfumato.contexts import ContextConfig
from sfumato.data import DataConfig, Folder, index, to_float
from sfumato.diffusion import UnitVariance
from sfumato.networks import UNetConfig
from sfumato.recipes.autoencoder_stage import TrainedAutoencoder
from sfumato.training import Budget, PreviewConfig, ValidationConfig


def draw_images(folder: Path, count: int = 120) -> Path:
    """Discs of any colour and place on white, 16 x 16."""
    folder.mkdir(exist_ok=True)
    for number, numbers in enumerate(np.random.default_rng(0).random((count, 6))):
        image = Image.new("RGB", (16, 16), "white")
        x, y, radius = 4 + 8 * numbers[0], 4 + 8 * numbers[1], 2 + 2 * numbers[2]
        box = (x - radius, y - radius, x + radius, y + radius)
        ImageDraw.Draw(image).ellipse(box, fill=tuple(int(200 * value) for value in numbers[3:]))
        image.save(folder / f"{number:03d}.png")
    return folder


few = {"preview": PreviewConfig(num=4), "validation": ValidationConfig(samples=16)}
autoencoder = TrainedAutoencoder(
    network=KLConfig(channels=(8, 16, 32), latent_channels=4, blocks=1, groups=4),
    features="random",  # of the perceptual loss; "auto" takes EfficientNet-Lite0 if installed
    budget=Budget(steps=40),
    **few,
)
run = replace(
    sfumato.recipe("digits"),
    name="latents",
    data=DataConfig(source=Folder(str(draw_images(Path("discs")))), resolution=16),
    autoencoder=autoencoder,
    conditioner=ContextConfig(),  # steered by nothing
    network=UNetConfig(channels=16, multipliers=(1,), blocks=1, attention_depths=()),
    batch_size=16,
    budget=Budget(steps=30),
    **few,
)
# Latents have unit variance, unlike pixels.
run = replace(run, denoiser=replace(run.denoiser, input_scale=UnitVariance(1.0)))
path = sfumato.train(run)  # the autoencoder first: runs/latents/autoencoder
sfumato.resume(path, overrides=["budget.steps=60"])  # goes on with the diffusion model alone

pipeline = sfumato.load(path)
images = to_float(index(run.data).images(range(8))[0])
with torch.no_grad():
    latents = pipeline.autoencoder.encode(images)
    error = (pipeline.autoencoder.decode(latents) - images).square().mean()
samples = pipeline.sample(4, steps=10)
print(f"images {tuple(images.shape[1:])}, latents {tuple(latents.shape[1:])}")
print(f"error of reconstructions: {error:.3f}; variance of images: {images.var():.3f}")
print(f"samples: {tuple(samples.shape)}")
