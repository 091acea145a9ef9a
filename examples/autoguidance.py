"""Autoguidance: sampling leads away from a weaker version of the same model.

    python examples/autoguidance.py

Each guess of the denoiser is moved on from that of the weaker model: weak + scale * (good - weak).
Both are steered alike, so unlike classifier-free guidance this does not narrow what is made.
Runs keep their averaged weights after 256, 512, 1,024, ... steps for good, as `snapshots`.

Source: Karras et al. 2024, "Guiding a diffusion model with a bad version of itself"
(arXiv:2406.02507).
"""

from dataclasses import replace

import torch

import sfumato
from sfumato.networks import UNetConfig
from sfumato.observability.images import grid_image, save_png
from sfumato.runs import snapshot
from sfumato.training import Budget, OptimizerConfig, PreviewConfig, ValidationConfig

run = replace(
    sfumato.recipe("digits"),
    name="autoguidance",
    network=UNetConfig(channels=8, multipliers=(1,), blocks=1, attention_depths=()),
    batch_size=8,
    optimizer=OptimizerConfig(learning_rate=2e-3, schedule="constant"),
    budget=Budget(steps=300),
    preview=PreviewConfig(num=4),
    validation=ValidationConfig(samples=20),
)
path = sfumato.train(run)
pipeline = sfumato.load(path)

# The weaker model is the run's own, as it was at step 256; any other model of the same images and
# contexts will do, such as `sfumato.load("runs/smaller").model`.
weaker = snapshot(path, step=256)

digits = list("0123456789")
rows = []
for scale in (0.0, 1.0, 2.0):  # 0 is the weaker model, 1 the model itself, above 1 leads away
    images = pipeline.sample(
        10, category=digits, guidance=1.0, steps=10, autoguidance=(weaker, scale)
    )
    rows.append(images)
plain = pipeline.sample(10, category=digits, guidance=1.0, steps=10)

print(f"scale 1 is no guidance: {torch.allclose(rows[1], plain, atol=1e-4)}")
print(f"scale 2 moves samples by {(rows[2] - plain).abs().mean():.3f} on average")
sheet = grid_image(torch.cat(rows), columns=10, row_labels=["weaker", "model", "guided"])
print(f"samples: {save_png(sheet, path / 'autoguidance.png')}")
