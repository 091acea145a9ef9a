"""The peer that benchmarks measure us against: diffusers' unconditional example, its loop rewritten
after its documentation.

What is kept because it costs time there: noise and images in the training precision, `EMAModel` as
it comes, a fresh
`.item()` of the loss at each step. What is left out because it isn't the loop's: accelerate,
trackers, the progress bar, data.
Source: https://huggingface.co/docs/diffusers/training/unconditional_training
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import cache
from itertools import pairwise, product

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn import functional as F

# of widths: 32 is diffusers' own number of norm groups, too coarse to come within 3 % of a small
# target
GRANULARITY = 16
TOLERANCE = 0.03


def build_peer(
    parameters_target: int, resolution: int, head_channels: int, classes: int | None = None
) -> UNet2DModel:
    """A U-Net within 3 % of `parameters_target`, embeddings of `classes` aside, attention at its
    deepest level (8x8) and in the middle.

    Among those of that size it takes the widths closest to (1, 2, ..., 2) times the first.

    Raises:
        ValueError: if no such widths exist.
    """
    depths = max(2, round(math.log2(resolution)) - 2)
    for widths in _candidates(parameters_target, depths, resolution, head_channels):
        if abs(_count(widths, resolution, head_channels) / parameters_target - 1) <= TOLERANCE:
            return _unet(widths, resolution, head_channels, classes)
    raise ValueError(
        f"no widths come within 3 % of {parameters_target} parameters with heads of "
        f"{head_channels} channels"
    )


def _candidates(
    target: int, depths: int, resolution: int, head_channels: int
) -> Iterator[tuple[int, ...]]:
    """Widths around those that hit the target with (1, 2, ..., 2), best shape first."""

    def regular(width: int) -> tuple[int, ...]:
        deepest = max(1, round(2 * width / head_channels)) * head_channels
        return (width, *[2 * width] * (depths - 2), deepest)

    first = GRANULARITY
    while _count(regular(first), resolution, head_channels) < target:
        first += GRANULARITY
    found = set()
    for width in range(
        max(GRANULARITY, first - 2 * GRANULARITY), first + 3 * GRANULARITY, GRANULARITY
    ):
        inner = [range(max(GRANULARITY, 2 * width - 48), 2 * width + 49, GRANULARITY)] * (
            depths - 2
        )
        deepest = [head_channels * k for k in range(1, 2 + 4 * width // head_channels)]
        shapes = ((width, *rest) for rest in product(*inner, deepest))
        found |= {
            shape for shape in shapes if all(b >= a - GRANULARITY for a, b in pairwise(shape))
        }

    def irregularity(widths: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
        distance = sum(abs(math.log(w / (2 * widths[0]))) for w in widths[1:])
        return distance + (0.01 if _groups(widths) < 32 else 0.0), widths

    yield from sorted(found, key=irregularity)


def _groups(widths: tuple[int, ...]) -> int:
    return 32 if all(width % 32 == 0 for width in widths) else GRANULARITY


def _unet(
    widths: tuple[int, ...], resolution: int, head_channels: int, classes: int | None = None
) -> UNet2DModel:
    plain = len(widths) - 1
    return UNet2DModel(
        sample_size=resolution,
        layers_per_block=2,
        block_out_channels=widths,
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
        attention_head_dim=head_channels,
        norm_num_groups=_groups(widths),
        num_class_embeds=classes,
    )


@cache
def _count(widths: tuple[int, ...], resolution: int, head_channels: int) -> int:
    with torch.device("meta"):
        return _unet(widths, resolution, head_channels).num_parameters()


class PeerTrainer:
    """The example's training step, and the state that it needs, on the model's device.

    Args:
        bf16: `mixed_precision="bf16"`: the forward pass under autocast, images and noise in
            bfloat16, weights in float32.
        channels_last: model and images in channels_last, which the example doesn't do.
        ema: `use_ema`, with the example's defaults.
        steps, warmup_steps: length of the cosine learning-rate schedule.
    """

    def __init__(
        self,
        model: UNet2DModel,
        *,
        bf16: bool = False,
        channels_last: bool = False,
        ema: bool = False,
        steps: int = 10_000,
        warmup_steps: int = 500,
    ) -> None:
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.model = model.to(memory_format=self.memory_format).train()
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.scheduler = DDPMScheduler(
            num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon"
        )
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        self.learning_rate = get_scheduler(
            "cosine", self.optimizer, num_warmup_steps=warmup_steps, num_training_steps=steps
        )
        self.ema = (
            EMAModel(
                model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75
            )
            if ema
            else None
        )
        self.logs: dict[str, float] = {}

    def step(self, images: Tensor, labels: Tensor | None = None) -> float:
        """Train on `images` (B, 3, H, W) in [-1, 1], on the model's device; return the loss,
        fetched from the device.
        """
        clean = images.to(self.dtype, memory_format=self.memory_format)
        noise = torch.randn(clean.shape, dtype=self.dtype, device=clean.device)
        timesteps = torch.randint(
            0, self.scheduler.config.num_train_timesteps, (len(clean),), device=clean.device
        ).long()
        noisy = self.scheduler.add_noise(clean, noise, timesteps)

        with torch.autocast(
            clean.device.type, dtype=torch.bfloat16, enabled=self.dtype is torch.bfloat16
        ):
            prediction = self.model(noisy, timesteps, labels).sample
        loss = F.mse_loss(prediction.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.learning_rate.step()
        self.optimizer.zero_grad()

        if self.ema is not None:
            self.ema.step(self.model.parameters())
        self.logs = {"loss": loss.detach().item(), "lr": self.learning_rate.get_last_lr()[0]}
        if self.ema is not None:
            self.logs["ema_decay"] = self.ema.cur_decay_value
        return self.logs["loss"]


class PeerSampler:
    """`DDIMPipeline` up to the copy to the host: N deterministic steps, the whole model in one
    precision.

    Args:
        model: copied, so that a trainer's stays as it is.
        steps: denoising steps.
        batch: images in a call.
        dtype: of the weights and of the sample, what `from_pretrained(torch_dtype=...)` sets.
        channels_last: memory format of the model.
    """

    def __init__(
        self,
        model: UNet2DModel,
        *,
        steps: int = 50,
        batch: int = 64,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.model = copy.deepcopy(model).to(dtype=dtype, memory_format=memory_format).eval()
        self.scheduler = DDIMScheduler.from_config(DDPMScheduler(num_train_timesteps=1000).config)
        self.steps, self.batch, self.dtype = steps, batch, dtype

    @torch.no_grad()
    def __call__(
        self, generator: torch.Generator | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Images (batch, 3, H, W) in [0, 1], on the model's device."""
        size, device = self.model.config.sample_size, self.model.device
        image = torch.randn(
            (self.batch, 3, size, size), generator=generator, device=device, dtype=self.dtype
        )
        self.scheduler.set_timesteps(self.steps)
        for t in self.scheduler.timesteps:
            prediction = self.model(image, t, labels).sample
            image = self.scheduler.step(prediction, t, image, eta=0.0).prev_sample
        return (image / 2 + 0.5).clamp(0, 1)


def main() -> None:
    """Two steps of everything, to see that it runs."""
    model = build_peer(6_500_000, 32, 64)
    print(model.config.block_out_channels, model.num_parameters())
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    for options in ({}, {"bf16": True, "channels_last": True, "ema": True}):
        trainer = PeerTrainer(model, **options)
        print([trainer.step(images) for _ in range(2)], trainer.logs)
    for dtype in (torch.float32, torch.bfloat16):
        print(PeerSampler(model, steps=2, batch=2, dtype=dtype, channels_last=True)().shape)


if __name__ == "__main__":
    main()
