"""What an autoencoder is, to all that use one."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Codec(nn.Module, ABC):
    """Images to latents and back, of whatever mean and scale.

    Attributes:
        factor: side of an image over the side of its latents.
        latent_channels, image_channels: of either.
    """

    factor: int
    latent_channels: int
    image_channels: int

    @abstractmethod
    def moments(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> mean and log-variance of their latents, (B, 2 c, H/f,
        W/f).
        """

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, c, h, w) -> images (B, C, f h, f w), not clamped."""
        result: Tensor = self.tail(self.head(z))
        return result

    @abstractmethod
    def head(self, z: Tensor) -> Tensor:
        """Latents -> what `tail` makes images of, (B, _, H/2, W/2) or finer."""

    @property
    @abstractmethod
    def tail(self) -> nn.Module:
        """The part of the decoder that needs the most memory; it shares the decoder's layers."""
