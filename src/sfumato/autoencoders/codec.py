"""The interface of autoencoders."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Codec(nn.Module, ABC):
    """An autoencoder: images to latents of any mean and scale, and back.

    Attributes:
        factor: side of an image over the side of its latents.
        latent_channels, image_channels: channels of latents and of images.
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
        result: Tensor = self.high_res_decoder(self.decode_low_res(z))
        return result

    @abstractmethod
    def decode_low_res(self, z: Tensor) -> Tensor:
        """Decode latents to feature maps, the input of `high_res_decoder`: (B, _, H/2, W/2) or finer."""

    @property
    @abstractmethod
    def high_res_decoder(self) -> nn.Module:
        """The part of the decoder that needs the most memory; it shares the decoder's layers."""
