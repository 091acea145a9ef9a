"""The interface of autoencoders."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Codec(nn.Module, ABC):
    """An autoencoder: images to latents of whatever mean and scale, and back.

    Attributes:
        factor: side of an image over the side of its latents.
        latent_channels, image_channels: of either.
    """

    factor: int
    latent_channels: int
    image_channels: int

    @abstractmethod
    def moments(self, x: Tensor) -> Tensor:
        """Encode images (B, C, H, W) in [-1, 1].

        Returns:
            Mean and log-variance of their latents, (B, 2 c, H/f, W/f).
        """

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents (B, c, h, w) to images (B, C, f h, f w), not clamped."""
        result: Tensor = self.tail(self.head(z))
        return result

    @abstractmethod
    def head(self, z: Tensor) -> Tensor:
        """Decode latents to the input of `tail`, (B, _, H/2, W/2) or finer."""

    @property
    @abstractmethod
    def tail(self) -> nn.Module:
        """The part of the decoder that needs the most memory; it shares the decoder's layers."""
