"""The space in which a diffusion model works: latents of zero mean and unit variance, or the pixels
themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfumato.autoencoders.codec import Codec
from sfumato.autoencoders.tiling import decode_in_tiles
from sfumato.errors import DataError, ShapeError

WHOLE = 1024 * 1024  # pixels up to which images are decoded whole
# share of a latent channel's variance that lies between images, below which the channel is dead
DEAD = 0.01

Gaussian = Callable[[tuple[int, ...]], Tensor]


class Pixels(nn.Module):
    """The images themselves: the space of a model without an autoencoder."""

    factor = 1

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.latent_channels = self.image_channels = channels

    def moments(self, x: Tensor) -> Tensor:
        """Return the images as they are."""
        return x

    def encode(self, x: Tensor) -> Tensor:
        """Return the images as they are."""
        return x

    def sample_posterior(self, moments: Tensor, gaussian: Gaussian) -> Tensor:
        """Return the images as they are: pixels have no posterior."""
        return moments

    def decode(self, z: Tensor) -> Tensor:
        """Return the images as they are."""
        return z

    def paste_known(self, generated: Tensor, image: Tensor, known: Tensor) -> Tensor:
        """Return the generated images: without a decoder, what was known has not changed."""
        return generated


class LatentAutoencoder(nn.Module):
    """An autoencoder whose latents have zero mean and unit variance in every channel, over the
    training set.

    What other libraries call scale and shift factors is measured and stored here, so there are none
    to set.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, codec: Codec, mean: Tensor, deviation: Tensor) -> None:
        """Wrap a codec, whose own latents have this mean and deviation, (c,) each."""
        super().__init__()
        self.codec = codec
        self.factor, self.latent_channels, self.image_channels = (
            codec.factor,
            codec.latent_channels,
            codec.image_channels,
        )
        self.register_buffer("mean", mean.float())
        self.register_buffer("deviation", deviation.float())

    def moments(self, x: Tensor) -> Tensor:
        """Encode images (B, C, H, W) in [-1, 1].

        Returns:
            Mean and log-variance of their latents, (B, 2 c, H/f, W/f).
        Raises:
            ShapeError: for other channels, or sides that are not multiples of `factor`.
        """
        if (
            x.shape[1] != self.image_channels
            or x.shape[-2] % self.factor
            or x.shape[-1] % self.factor
        ):
            raise ShapeError(
                f"images of {x.shape[1]} channels and {x.shape[-2]} x {x.shape[-1]} pixels do not "
                f"fit an autoencoder of {self.image_channels} channels and factor {self.factor}",
                where="autoencoder",
                hint=f"use {self.image_channels} channels, and sides that are multiples of "
                f"{self.factor}",
            )
        mean, log_variance = self.codec.moments(x).chunk(2, dim=1)
        scale = self.deviation[:, None, None]
        return torch.cat(
            [(mean - self.mean[:, None, None]) / scale, log_variance - 2 * scale.log()], dim=1
        )

    def encode(self, x: Tensor) -> Tensor:
        """Return the means of the latents, (B, c, h, w)."""
        return self.moments(x).chunk(2, dim=1)[0]

    def sample_posterior(self, moments: Tensor, gaussian: Gaussian) -> Tensor:
        """Draw latents (B, c, h, w) from their moments (B, 2 c, h, w), one for each image."""
        mean, log_variance = moments.float().chunk(2, dim=1)
        return mean + (0.5 * log_variance).exp() * gaussian(tuple(mean.shape)).to(mean)

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents (B, c, h, w) to images, not clamped.

        Without gradients, images of more than 1024 x 1024 pixels are decoded a tile at a time, to
        the same result.
        """
        unscaled = z * self.deviation[:, None, None] + self.mean[:, None, None]
        if (
            unscaled.shape[-2] * unscaled.shape[-1] * self.factor**2 > WHOLE
            and not torch.is_grad_enabled()
        ):
            return decode_in_tiles(self.codec, unscaled)
        return self.codec.decode(unscaled)

    def paste_known(self, generated: Tensor, image: Tensor, known: Tensor) -> Tensor:
        """Return the generated images with the known pixels taken from `image`, not decoded.

        `known` is 1 where the image is known; shares blend.
        """
        return torch.lerp(generated, image, known)


Autoencoder = Pixels | LatentAutoencoder


@dataclass(frozen=True)
class Statistics:
    """Statistics of a codec's latents over a set of images, by channel.

    Attributes:
        mean, deviation: of a draw.
        informative: share of the variance that lies between images and places, rather than in the
            draw: near 0 for a dead channel.
    """

    mean: Tensor
    deviation: Tensor
    informative: Tensor

    @property
    def dead(self) -> list[int]:
        """Channels that hold no information about the images."""
        return torch.nonzero(self.informative < DEAD)[:, 0].tolist()


@torch.no_grad()
def measure(codec: Codec, images: Iterable[Tensor]) -> Statistics:
    """Measure the statistics of latents over batches of images (B, C, H, W) in [-1, 1].

    Raises:
        DataError: if a channel has no variance at all.
    """
    count = 0
    total = squares = within = torch.zeros(())
    for x in images:
        mean, log_variance = codec.moments(x).double().chunk(2, dim=1)
        values = mean.transpose(0, 1).flatten(1)
        count += values.shape[1]
        total, squares = total + values.sum(1), squares + values.square().sum(1)
        within = within + log_variance.exp().transpose(0, 1).flatten(1).sum(1)
    average = total / count
    between, drawn = (squares / count - average.square()).clamp(min=0), within / count
    variance = between + drawn
    if not bool((variance > 1e-12).all()):
        raise DataError(
            "a latent channel has zero variance (the encoder collapsed)",
            where="autoencoder",
            hint="train it longer, or on images that differ",
        )
    return Statistics(
        mean=average.float(),
        deviation=variance.sqrt().float(),
        informative=(between / variance).float(),
    )
