"""Complete an image, vary one, sample another size, and save samples with their settings.

    python examples/inpainting.py

Any trained model does all of this; nothing is trained for it. Images are tensors (C, H, W) with
values in [0, 1].
"""

import json
from dataclasses import replace

import torch
from PIL import Image

import sfumato
from sfumato.data import index
from sfumato.networks import UNetConfig
from sfumato.training import Budget, PreviewConfig, ValidationConfig

run = replace(
    sfumato.recipe("digits"),
    name="inpainting",
    network=UNetConfig(channels=16, multipliers=(1,), blocks=1, attention_depths=()),
    batch_size=16,
    budget=Budget(steps=50),
    preview=PreviewConfig(num=4),
    validation=ValidationConfig(samples=30),
)
path = sfumato.train(run)
pipeline = sfumato.load(path)

dataset = index(run.data)
given = dataset.images(dataset.holdout[:1])[0][0] / 255  # a held-out digit, (1, 8, 8)

# Inpainting: the mask is 1 where the image is made anew. `resample=2` goes back and forth twice at
# each step, so that the new part agrees better with what is kept.
mask = torch.zeros(1, 8, 8)
mask[:, :, 4:] = 1
completed = pipeline.sample(4, image=given, mask=mask, resample=2, steps=10)
kept = (completed - given)[..., :4].abs().max()
made = (completed - given)[..., 4:].abs().mean()
print(f"inpainting: the kept half differs by {kept:.5f}, the new half by {made:.3f}")

# Image to image: the image is sent a part of the way to noise, and denoised from there.
for strength in (0.2, 0.5, 0.8):
    varied = pipeline.sample(4, image=given, strength=strength, steps=10)
    print(f"strength {strength}: differs by {(varied - given).abs().mean():.3f}")

# Another size than that of training.
wide = pipeline.sample(2, size=(8, 21), category="3", steps=10)
print(f"another size: {tuple(wide.shape)}")

# Saved images carry the settings that they were made with.
files = pipeline.generate(3, category=["1", "2", "3"], steps=10, seed=7).save(path / "generated")
settings = json.loads(Image.open(files[2]).text["sfumato"])
print(f"{files[2].name} was made with {settings}")
