"""Control branches of diffusers' U-Nets: ControlNetModel."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.diffusers_library import import_diffusers, quiet
from sfumato.errors import ConfigError
from sfumato.networks.checks import resize_maps
from sfumato.networks.diffusers_weights import load_weights
from sfumato.nn.controllable import is_drawn

CHANNELS = (16, 32, 96, 256)  # of the layers that bring an image to the grid of latents, by halves
RGB = 3  # images have at least as many channels, so that other programs can give them as files
KIND = "ControlNetModel"


class UNetControl(nn.Module):
    """A ControlNetModel of diffusers. It adds zeros for images that come with nothing drawn, or with
    a blank sheet, so that the network predicts as without it.

    Attributes:
        model: reads images; maps with fewer channels than it reads are followed by zeros.
        factor: side of an image over that of the network's input.
    """

    def __init__(self, model: Any, factor: int) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(
        self, x: Tensor, noise_input: Tensor, spatial: Tensor, arguments: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return what is added to the features of the network's second half.

        Args:
            spatial: maps over the image, (B, C factor^2, H, W) or (B, C factor^2, 1, 1).
            arguments: further arguments of the network.
        """
        drawn = is_drawn(spatial, self.factor**2)
        # training needs gradients of all weights, be they zero
        if not (bool(drawn.any()) or torch.is_grad_enabled()):
            return {}
        down, middle = self.model(
            x, noise_input, controlnet_cond=self.image(x, spatial), return_dict=False, **arguments
        )
        steered = drawn[:, None, None, None]
        return {
            "down_block_additional_residuals": [torch.where(steered, part, 0) for part in down],
            "mid_block_additional_residual": torch.where(steered, middle, 0),
        }

    def image(self, x: Tensor, spatial: Tensor) -> Tensor:
        """Return the image that the model reads, (B, channels, factor H, factor W)."""
        maps = F.pixel_shuffle(resize_maps(spatial, x), self.factor).to(x.dtype)
        missing = self.model.config.conditioning_channels - maps.shape[1]
        return F.pad(maps, (0, 0, 0, 0, 0, missing))


def new_branch(model: Any, channels: int, factor: int) -> UNetControl:
    """Return a control branch with the weights of a U-Net's first half; its output is zero.

    Raises:
        ConfigError: if diffusers has none for this U-Net.
    """
    halvings = round(math.log2(factor))
    if 2**halvings != factor or halvings >= len(CHANNELS):
        raise ConfigError(
            f"an image is {factor} times as large as the network's input",
            where="adapter.kind=controlnet",
            hint="control branches are for factors 1, 2, 4 and 8",
        )
    diffusers = import_diffusers(KIND, where="adapter.kind")
    try:
        with quiet():
            branch = diffusers.ControlNetModel.from_unet(
                model,
                conditioning_channels=max(RGB, channels),
                conditioning_embedding_out_channels=CHANNELS[: halvings + 1],
            )
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ConfigError(
            f"diffusers has no control branch for this U-Net: {str(error)[:300]}",
            where="adapter.kind",
            hint="use adapter.kind=lora",
        ) from None
    return UNetControl(branch, factor)


def read_branch(folder: Path, factor: int) -> UNetControl:
    """Read a control branch from a folder of diffusers, in float32.

    Raises:
        CheckpointError: if the weights cannot be read or do not fit.
    """
    diffusers = import_diffusers(KIND, where=str(folder))
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with quiet():
        model = diffusers.ControlNetModel(
            **{key: value for key, value in settings.items() if not key.startswith("_")}
        )
    load_weights(model, folder)
    return UNetControl(model, factor)
