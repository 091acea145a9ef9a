"""Small autoencoders with every weight awake."""

from __future__ import annotations

import torch

from sfumato.autoencoders import KLAutoencoder, KLConfig


def random_autoencoder(config: KLConfig, channels: int = 3, seed: int = 0) -> KLAutoencoder:
    torch.manual_seed(seed)
    codec = KLAutoencoder(config, image_channels=channels).eval().requires_grad_(False)
    for parameter in codec.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return codec
