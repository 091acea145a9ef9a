"""All of diffusion in one file: a schedule, a loss, a network, a training loop and a sampler.

    python examples/minimal_training.py

Only the core of sfumato is used: no run, no trainer, no files but the last one. The images are
scikit-learn's handwritten digits, 8 x 8 pixels. The example writes minimal_training.png, a grid of
samples. With STEPS = 100 they are rough; 2,000 steps, a few minutes on a CPU, make clean digits.
"""

import torch
from PIL import Image
from sklearn.datasets import load_digits

from sfumato.diffusion import Flow, Linear, NetworkDenoiser, Objective
from sfumato.networks import UNetConfig
from sfumato.sampling import DPMSolverPP2M, grid, sample

STEPS, BATCH, ROWS = 100, 16, 4

torch.manual_seed(0)
images = torch.tensor(load_digits().images).float()[:, None] / 8 - 1  # (1797, 1, 8, 8) in [-1, 1]

# The schedule turns a time t in [0, 1] into a noise level (alpha, sigma); the noisy image is
# x = alpha * image + sigma * noise. Linear is the path of flow matching: alpha = 1 - t, sigma = t.
schedule = Linear()

# The network sees a noisy image and its noise level. `Flow` says what its output means: the
# velocity noise - image. The denoiser turns it into a guess of the clean image and of the noise.
config = UNetConfig(channels=16, multipliers=(1, 2), blocks=1, attention_depths=())
network = config.build(image_channels=1)
denoiser = NetworkDenoiser(network=network, parameterization=Flow())

# The loss is the squared error of the velocity at random noise levels.
objective = Objective(schedule=schedule)
optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)

losses = []
for step in range(1, STEPS + 1):
    clean = images[torch.randint(len(images), (BATCH,))]
    level = objective.levels(torch.rand(BATCH))
    noise = torch.randn_like(clean)
    loss = objective(denoiser, clean, level=level, noise=noise).per_sample.mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    if step % 20 == 0:
        print(f"step {step}: loss {sum(losses[-20:]) / 20:.3f}")

# Sampling begins with pure noise and goes down a grid of noise levels, from one level to the next
# along the denoiser's guess. Any schedule and any solver will do here.
network.eval()
levels = grid(schedule, steps=20)
start = levels.at(0).sigma * torch.randn(ROWS * ROWS, 1, 8, 8)
samples = sample(DPMSolverPP2M(), denoiser, start, levels)

pixels = ((samples.clamp(-1, 1) + 1) * 127.5).byte()
sheet = pixels.view(ROWS, ROWS, 8, 8).transpose(1, 2).reshape(8 * ROWS, 8 * ROWS)
enlarged = Image.fromarray(sheet.numpy()).resize((256, 256), Image.Resampling.NEAREST)
enlarged.save("minimal_training.png")
print("samples: minimal_training.png")
