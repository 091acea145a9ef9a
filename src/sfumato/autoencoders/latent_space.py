"""The space that a diffusion model works in: latents of zero mean and unit variance, or the pixels
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
# share of a latent channel's variance that lies between images, below which it tells nothing of
# them
DEAD = 0.01

Gaussian = Callable[[tuple[int, ...]], Tensor]


class Pixels(nn.Module):
    """The images themselves: what a model without an autoencoder works in."""

    factor = 1

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.latent_channels = self.image_channels = channels

    def moments(self, x: Tensor) -> Tensor:
        """The images."""
        return x

    def encode(self, x: Tensor) -> Tensor:
        """The images."""
        return x

    def draw(self, moments: Tensor, gaussian: Gaussian) -> Tensor:
        """The images: there is nothing to draw."""
        return moments

    def decode(self, z: Tensor) -> Tensor:
        """The images."""
        return z

    def paste_known(self, made: Tensor, image: Tensor, known: Tensor) -> Tensor:
        """The images that were made: what was known of them is as it was."""
        return made


class LatentAutoencoder(nn.Module):
    """An autoencoder whose latents have zero mean and unit variance in every channel, over the
    training set.

    What others call scale and shift factors is measured and kept here, so there is none to set.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, codec: Codec, mean: Tensor, deviation: Tensor) -> None:
        """mean, deviation (c,): of the codec's own latents."""
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
        """Mean and log-variance of the latents of images (B, C, H, W) in [-1, 1], (B, 2 c, H/f,
        W/f).

        Raises:
            ShapeError: for images that it cannot take.
        """
        if (
            x.shape[1] != self.image_channels
            or x.shape[-2] % self.factor
            or x.shape[-1] % self.factor
        ):
            raise ShapeError(
                f"images of {x.shape[1]} channels and {x.shape[-2]} x {x.shape[-1]} pixels, for "
                "an autoencoder of "
                f"{self.image_channels} channels that makes sides {self.factor} times smaller",
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
        """The latents' means, (B, c, h, w)."""
        return self.moments(x).chunk(2, dim=1)[0]

    def draw(self, moments: Tensor, gaussian: Gaussian) -> Tensor:
        """Latents (B, c, h, w): one draw of each."""
        mean, log_variance = moments.float().chunk(2, dim=1)
        return mean + (0.5 * log_variance).exp() * gaussian(tuple(mean.shape)).to(mean)

    def decode(self, z: Tensor) -> Tensor:
        """Images of latents; not clamped. Large ones are decoded a tile at a time, to the same
        result.
        """
        own = z * self.deviation[:, None, None] + self.mean[:, None, None]
        if own.shape[-2] * own.shape[-1] * self.factor**2 > WHOLE and not torch.is_grad_enabled():
            return decode_in_tiles(self.codec, own)
        return self.codec.decode(own)

    def paste_known(self, made: Tensor, image: Tensor, known: Tensor) -> Tensor:
        """The images that were made, but what was known (1; shares blend) as it was given, not as
        it was decoded.
        """
        return torch.lerp(made, image, known)


Autoencoder = Pixels | LatentAutoencoder


@dataclass(frozen=True)
class Statistics:
    """Of a codec's latents over a set of images, by channel.

    Attributes:
        mean, deviation: of a draw.
        informative: share of the variance that lies between images and places, rather than in the
            draw: near 0 for a channel that tells nothing.
    """

    mean: Tensor
    deviation: Tensor
    informative: Tensor

    @property
    def dead(self) -> list[int]:
        """Channels that tell nothing."""
        return torch.nonzero(self.informative < DEAD)[:, 0].tolist()


@torch.no_grad()
def measure(codec: Codec, images: Iterable[Tensor]) -> Statistics:
    """Statistics over batches of images (B, C, H, W) in [-1, 1].

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
            "latents of no variance",
            where="autoencoder",
            hint="train it longer, or on images that differ",
        )
    return Statistics(
        mean=average.float(),
        deviation=variance.sqrt().float(),
        informative=(between / variance).float(),
    )
