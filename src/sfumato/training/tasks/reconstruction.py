"""What an autoencoder learns: to reconstruct images through latents that are easy to generate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato import randomness
from sfumato.autoencoders import KLAutoencoder
from sfumato.autoencoders.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from sfumato.autoencoders.image_metrics import psnr, ssim
from sfumato.config.bounds import Fraction, NonNegative, Positive, Size
from sfumato.data import Batch, Dataset, ShapeGroup, to_float
from sfumato.distributed import current
from sfumato.errors import ConfigError
from sfumato.networks.perceptual import Features, distance
from sfumato.nn.accelerable import Accelerable
from sfumato.observability.images import grid_image, save_png
from sfumato.process.signals import poll
from sfumato.sampling import StepInfo
from sfumato.storage.run_directory import RunDirectory
from sfumato.training.config import TrainingConfig
from sfumato.training.optimizers import OptimizerConfig
from sfumato.training.tasks.protocol import OptimizedPart, SampleLosses

MIN_SCALE = 0.25  # least factor by which the equivariance regularizer scales the sides of latents
CHARBONNIER = 1e-3


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """A patch discriminator, whose adversarial loss brings out texture.

    Attributes:
        weight: multiplier on the adaptive adversarial weight (VQGAN).
        start: fraction of the budget after which the adversarial loss is enabled; the discriminator
            is trained from the beginning.
        channels, layers: of the discriminator.
        optimizer: of the discriminator.
    """

    weight: Positive = 0.5
    start: Fraction = 0.5
    channels: Size = 32
    layers: Size = 2
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=2e-4, betas=(0.5, 0.9), weight_decay=0.0
    )

    def __post_init__(self) -> None:
        if not (self.weight > 0 and 0 <= self.start <= 1):
            raise ConfigError(
                f"weight = {self.weight}, start = {self.start}",
                where="autoencoder.losses.adversarial",
                hint="a weight above 0, and a start from 0 to 1",
            )


@dataclass(frozen=True, kw_only=True)
class LossesConfig:
    """The losses of an autoencoder.

    Attributes:
        pixels: `l1`, or `charbonnier`, which is smooth at 0.
        perceptual: weight of the perceptual loss, a distance in a frozen network's features; a
            larger weight gives sharper images that are further from the pixel values.
        kl: weight of the KL divergence of each latent value from the standard normal; a small one
            only bounds the latents.
        equivariance: fraction of batches in which the latents are downscaled or rotated, and must
            decode to the image downscaled or rotated: smoother latents, which are easier to
            generate.
        adversarial: the adversarial loss; None for none.

    Source: Rombach et al. 2022 (arXiv:2112.10752), appendix G; Kouzelis et al. 2025
        (arXiv:2502.09509) for the equivariance.
    """

    pixels: Literal["l1", "charbonnier"] = "l1"
    perceptual: NonNegative = 0.1
    kl: NonNegative = 1e-4
    equivariance: Fraction = 0.0
    adversarial: AdversarialConfig | None = None

    def __post_init__(self) -> None:
        if not (self.perceptual >= 0 and self.kl >= 0 and 0 <= self.equivariance <= 1):
            raise ConfigError(
                f"perceptual = {self.perceptual}, kl = {self.kl}, equivariance = "
                f"{self.equivariance}",
                where="autoencoder.losses",
                hint="weights are at least 0, equivariance is a share from 0 to 1",
            )


class Reconstructor(nn.Module):
    """An autoencoder and its discriminator, if there is one."""

    def __init__(self, codec: KLAutoencoder, adversary: PatchDiscriminator | None) -> None:
        super().__init__()
        self.codec, self.adversary = codec, adversary


class Reconstruction:
    """Encodes images into latents and decodes them again."""

    def __init__(
        self,
        config: TrainingConfig,
        *,
        model: Reconstructor,
        losses: LossesConfig,
        features: Features,
        dataset: Dataset,
        directory: RunDirectory,
    ) -> None:
        self.config, self.model, self.losses, self.features, self.directory = (
            config,
            model,
            losses,
            features,
            directory,
        )
        self.facts = {"features": features.name, "image_shape": list(dataset.image_shape)}
        self._device = next(model.parameters()).device
        positions = (
            dataset.with_common_shape(dataset.holdout)
            if len(dataset.with_common_shape(dataset.holdout))
            else dataset.with_common_shape(dataset.training)
        )
        order = randomness.permutation(config.seed, "validation", index=0, size=len(positions))
        chosen = positions[order[: max(config.validation.samples, config.preview.num)]]
        self._real = to_float(dataset.images(chosen)[0])

    def optimized_parts(self, model: Reconstructor) -> list[OptimizedPart]:
        """Return the autoencoder, and its discriminator if it has one; every batch trains both."""
        parts = [OptimizedPart("autoencoder", model.codec, self.config.optimizer)]
        if model.adversary is not None and self.losses.adversarial is not None:
            parts.append(
                OptimizedPart("adversary", model.adversary, self.losses.adversarial.optimizer)
            )
        return parts

    def loss(
        self,
        model: Reconstructor,
        batch: Batch,
        group: ShapeGroup,
        chosen: slice,
        *,
        progress: float,
        dtype: torch.dtype,
    ) -> SampleLosses:
        """Return the sum of all losses of each sample, (n,); the notes hold each loss by name."""
        images, first, seed = (
            group.images[chosen].to(self._device),
            group.first + chosen.start,
            self.config.seed,
        )
        with torch.autocast(self._device.type, dtype=dtype, enabled=dtype is not torch.float32):
            mean, log_variance = model.codec.moments(images).float().chunk(2, dim=1)
            noise = randomness.normal(seed, "latent", first=first, shape=tuple(mean.shape)).to(mean)
            z = mean + (0.5 * log_variance).exp() * noise
            z, target = self._transform(z, images, batch.first)
            reconstruction = model.codec.decode(z).float()
            notes = {
                self.losses.pixels: self._pixel_loss(reconstruction, target),
                "perceptual": self._perceptual(reconstruction, target),
                "kl": 0.5
                * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).mean(1),
            }
            total = (
                notes[self.losses.pixels]
                + self.losses.perceptual * notes["perceptual"]
                + self.losses.kl * notes["kl"]
            )
            if model.adversary is not None and self.losses.adversarial is not None:
                notes["adversary"] = discriminator_loss(
                    model.adversary, target, reconstruction
                ).float()
                if progress >= self.losses.adversarial.start:
                    notes["pleasing"] = generator_loss(model.adversary, reconstruction).float()
                    weight = adaptive_weight(
                        total,
                        notes["pleasing"],
                        cast(nn.Parameter, model.codec.decoder.conv_out.weight),
                    )
                    total = total + self.losses.adversarial.weight * weight * notes["pleasing"]
                total = total + notes["adversary"]
        return SampleLosses(total, notes)

    def _transform(self, z: Tensor, images: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Downscale and rotate latents and images together, or return them as they are.

        `first` is the number of the batch's first sample.
        """
        chance, size, turn = randomness.uniform(
            self.config.seed, "equivariance", first=first, count=1, per_item=3
        )[0].tolist()
        if chance >= self.losses.equivariance:
            return z, images
        factor = images.shape[-1] // z.shape[-1]
        least = 1 if self.model.adversary is None else -(-self.model.adversary.smallest // factor)
        sides = [
            max(least, round(side * (MIN_SCALE + (1 - MIN_SCALE) * size))) for side in z.shape[2:]
        ]
        turns = int(turn * 4) if sides[0] == sides[1] else 0
        latents = F.interpolate(z, size=sides, mode="bilinear", antialias=True).rot90(turns, (2, 3))
        target = F.interpolate(
            images, size=[side * factor for side in sides], mode="bilinear", antialias=True
        )
        return latents, target.rot90(turns, (2, 3))

    def _perceptual(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Return the perceptual distance (B,), computed in float32.

        The features of similar images differ by less than bfloat16 resolves.
        """
        with torch.autocast(self._device.type, enabled=False):
            return distance(self.features, reconstruction, target)

    def _pixel_loss(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        error = reconstruction - target
        values = (
            error.abs() if self.losses.pixels == "l1" else (error.square() + CHARBONNIER**2).sqrt()
        )
        return values.flatten(1).mean(1)

    def log_metrics(self, losses: SampleLosses) -> dict[str, float]:
        """Return the mean of each loss."""
        return {f"train/{name}": float(values.mean()) for name, values in losses.notes.items()}

    @torch.no_grad()
    def validate(self, model: Reconstructor, average: Reconstructor) -> dict[str, Any]:
        """Return `validation/{ema,raw}/*`: PSNR in dB, SSIM, L1 and the perceptual distance.

        They are measured on held-out images, reconstructed from the means of their latents.
        """
        return {
            f"validation/{name}/{key}": value
            for name, which in (("ema", average), ("raw", model))
            for key, value in self._fidelity(which.codec).items()
        }

    def _fidelity(self, codec: KLAutoencoder) -> dict[str, float]:
        rows = []
        size = self.config.effective_micro_batch
        for first in range(0, len(self._real), size):
            poll()
            real = self._real[first : first + size].to(self._device)
            reconstructions = reconstruct(codec, real)
            figures = [
                psnr(reconstructions, real),
                ssim(reconstructions, real),
                (reconstructions - real).abs().flatten(1).mean(1),
                distance(self.features, reconstructions, real),
            ]
            rows.append(torch.stack([figure.cpu() for figure in figures], dim=1))
        means = torch.cat(rows).mean(0).tolist()
        return dict(zip(("psnr", "ssim", "l1", "perceptual"), means, strict=True))

    def summary(self, figures: Mapping[str, Any]) -> str:
        """Format the figures of the averaged weights in one line."""
        psnr_, ssim_, l1 = (figures[f"validation/ema/{name}"] for name in ("psnr", "ssim", "l1"))
        return f"held-out reconstructions PSNR {psnr_:.2f} dB  SSIM {ssim_:.3f}  L1 {l1:.4f}"

    @torch.no_grad()
    def preview(
        self, average: Reconstructor, step: int, on_step: Callable[[StepInfo], None]
    ) -> None:
        """Write samples/step-.../grid.png: real images, each with its reconstruction below it."""
        count = min(self.config.preview.num, len(self._real))
        real = self._real[:count]
        reconstructions = reconstruct(average.codec, real.to(self._device)).cpu()
        columns = next(number for number in range(min(8, count), 0, -1) if count % number == 0)
        rows = [
            torch.cat([real[i : i + columns], reconstructions[i : i + columns]])
            for i in range(0, count, columns)
        ]
        labels = ["real", "reconstructed"] * len(rows)
        sheet = grid_image((torch.cat(rows) + 1) / 2, columns=columns, row_labels=labels)
        folder = self.directory.samples / f"step-{step:09d}"
        current().on_first(
            lambda: str(save_png(sheet, folder / "grid.png", {"step": step, "weights": "ema"}))
        )

    def forward_images(self, config: TrainingConfig) -> tuple[int, int]:
        """Return `preview.num`, and `validation.samples` twice: for the weights and
        their average.
        """
        return config.preview.num, 2 * config.validation.samples

    def compiled_part(self, model: Reconstructor) -> Accelerable:
        """Return the encoder.

        The decoder's graph is traversed twice, to balance the losses, which compiled graphs do not
        allow.
        """
        return model.codec.encoder


def reconstruct(codec: KLAutoencoder, images: Tensor) -> Tensor:
    """Reconstruct images (B, C, H, W) from the means of their latents, clamped to [-1, 1]."""
    return codec.decode(codec.moments(images).chunk(2, dim=1)[0]).clamp(-1, 1)
