"""Autoencoders that only diffusers implements, frozen (extra `diffusers`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.autoencoders.codec import Codec
from sfumato.autoencoders.tiny import DETERMINISTIC_LOGVAR
from sfumato.diffusers_library import import_diffusers
from sfumato.errors import CheckpointError
from sfumato.networks.diffusers_weights import only_variant


class ForeignCodec(Codec):
    """One of diffusers' autoencoders.

    Attributes:
        channel_keys: keys of its configuration with the channels of images and of latents.
    """

    channel_keys = ("in_channels", "latent_channels")

    def __init__(self, model: Any, config: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.image_channels, self.latent_channels = (config[key] for key in self.channel_keys)
        self.factor = int(model.spatial_compression_ratio)

    @classmethod
    def load(cls, kind: str, folder: Path, *, variant: str = "") -> ForeignCodec:
        """Load an autoencoder from a folder in diffusers' layout.

        Args:
            variant: of its weights, e.g. "fp16".
        Raises:
            CheckpointError: for an unknown kind, or a folder that cannot be read.
            ConfigError: if diffusers is not installed.
        """
        if kind not in KNOWN:
            raise CheckpointError(
                f"unsupported autoencoder class {kind}",
                where=str(folder),
                hint=f"supported are AutoencoderKL, AutoencoderTiny and {', '.join(KNOWN)}",
            )
        diffusers = import_diffusers(kind, where="autoencoder")
        try:
            model = getattr(diffusers, kind).from_pretrained(
                str(folder),
                local_files_only=True,
                use_safetensors=True,
                variant=variant or only_variant(folder) or None,
                torch_dtype=torch.float32,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"cannot be read: {str(error)[:300]}", where=str(folder)
            ) from None
        # Keys with an underscore, such as the path that the model was loaded from, are left out.
        sizes = {
            name: value for name, value in dict(model.config).items() if not name.startswith("_")
        }
        return KNOWN[kind](model, {"_class_name": kind, **sizes})

    def moments(self, x: Tensor) -> Tensor:
        """Return the latents and a log-variance of -30, (B, 2 c, H/f, W/f)."""
        z = self.model.encode(x).latent
        return torch.cat([z, torch.full_like(z, DETERMINISTIC_LOGVAR)], dim=1)

    def decode_low_res(self, z: Tensor) -> Tensor:
        """Decode latents to images: diffusers' decoders are used as a whole."""
        result: Tensor = self.model.decode(z).sample
        return result

    @property
    def high_res_decoder(self) -> nn.Module:
        """The identity, since `decode_low_res` does everything."""
        return nn.Identity()


class QwenImageCodec(ForeignCodec):
    """AutoencoderKLQwenImage, an autoencoder of videos: images are videos of one frame."""

    channel_keys = ("input_channels", "z_dim")

    def moments(self, x: Tensor) -> Tensor:
        """Return mean and log-variance of the latents, (B, 2 c, H/f, W/f)."""
        posterior = self.model.encode(x.unsqueeze(2)).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1).squeeze(2)

    def decode_low_res(self, z: Tensor) -> Tensor:
        """Decode latents to images: diffusers' decoders are used as a whole."""
        result: Tensor = self.model.decode(z.unsqueeze(2)).sample.squeeze(2)
        return result


KNOWN = {"AutoencoderDC": ForeignCodec, "AutoencoderKLQwenImage": QwenImageCodec}
