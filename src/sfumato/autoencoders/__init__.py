"""From images to latents and back. The latents have zero mean and unit variance; nothing here knows
diffusion.
"""

from sfumato.autoencoders.codec import Codec
from sfumato.autoencoders.kl import KLAutoencoder, KLConfig
from sfumato.autoencoders.latent_space import (
    Autoencoder,
    LatentAutoencoder,
    Pixels,
    Statistics,
    measure,
)
from sfumato.autoencoders.tiny import TinyAutoencoder

__all__ = [
    "Autoencoder",
    "Codec",
    "KLAutoencoder",
    "KLConfig",
    "LatentAutoencoder",
    "Pixels",
    "Statistics",
    "TinyAutoencoder",
    "measure",
]
