"""Doodles: line drawings aligned with the image. Where the data have none, lines are extracted from
the image itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato import randomness
from sfumato.condition import Condition, ContextSizes
from sfumato.conditioners.protocol import Conditioner
from sfumato.config.bounds import Fraction
from sfumato.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DoodleConfig:
    """Steer by line drawings.

    Attributes:
        synthetic: share of training samples whose doodle is replaced by lines extracted from the
            image; samples without a doodle always get such lines.
        wobble: displacement of extracted lines, as a share of the side.
        missing_lines: largest share of the extracted lines that is removed.
        dropout: share of training samples whose doodle is hidden.
        guided: whether guidance leads away from images without the doodle; if not, the doodle is
            in all predictions, as in the control pipelines of diffusers.
    """

    synthetic: Fraction = 0.0
    wobble: Fraction = 0.01
    missing_lines: Fraction = 0.3
    dropout: Fraction = 0.1
    guided: bool = True

    def __post_init__(self) -> None:
        if not all(
            0 <= share <= 1
            for share in (self.synthetic, self.wobble, self.missing_lines, self.dropout)
        ):
            raise ConfigError(
                f"{self}", where="conditioner.doodle", hint="all values are fractions from 0 to 1"
            )


class DoodleConditioner(Conditioner):
    """context["doodle"] (B, 1, H, W), 1 paper to -1 ink -> Condition.spatial (B, 2, H, W).

    The doodle is NaN where none is given; the maps are ink, and 1 where one is given.
    """

    nothing: Tensor

    def __init__(self, config: DoodleConfig) -> None:
        super().__init__()
        self.config, self.dropout, self.guided = config, config.dropout, config.guided
        self.sizes = ContextSizes(spatial=2)
        self.register_buffer("nothing", torch.zeros(1, 2, 1, 1), persistent=False)

    def forward(self, context: Mapping[str, Any], batch_size: int) -> Condition:
        """Return ink, 0 to 1, and 1 where a doodle is given; without a context, return `null`."""
        if "doodle" not in context:
            return self.null(batch_size)
        doodle = context["doodle"].to(self.nothing.device)
        return Condition(
            spatial=torch.cat(
                [((1 - doodle) / 2).nan_to_num(0.0), (~doodle.isnan()).to(doodle.dtype)], dim=1
            )
        )

    def null(self, batch_size: int) -> Condition:
        """Return maps of zeros, (B, 2, 1, 1): no doodle is given."""
        return Condition(spatial=self.nothing.expand(batch_size, -1, -1, -1))

    def training_context(
        self, images: Tensor, context: Mapping[str, Any], *, seed: int, first: int
    ) -> dict[str, Any]:
        """Return a doodle for each training image: that of the data, or lines extracted from the image.

        Lines replace missing doodles and, for a share `synthetic` of images, those of the data.
        Draws are keyed by the samples' numbers.
        """
        draws = randomness.uniform(
            seed, "doodle", first=first, count=len(images), per_item=4 + 3 * _GRID**2
        ).to(images)
        synthetic = extract_lines(
            images, draws[:, 1:], wobble=self.config.wobble, dropped=self.config.missing_lines
        )
        if "doodle" not in context:
            return {"doodle": synthetic}
        doodles = context["doodle"].to(images)
        replaced = doodles.isnan().flatten(1).any(1) | (draws[:, 0] < self.config.synthetic)
        return {"doodle": torch.where(replaced[:, None, None, None], synthetic, doodles)}


_GRID = 4  # of the random fields that bend and drop lines


def extract_lines(images: Tensor, draws: Tensor, *, wobble: float, dropped: float) -> Tensor:
    """Extract the lines of images (B, C, H, W) in [-1, 1]: (B, 1, H, W), 1 paper to -1 ink.

    A soft threshold on a difference of Gaussians, with a random width and strength, puts ink where
    the image is darker than its surroundings: dark strokes, and the dark side of every edge. Lines
    bend a little, and some are missing.

    Args:
        draws: uniform in [0, 1), (B, 3 + 3 * 16).
    Source: Winnemöller, Kyprianidis & Olsen 2012, "XDoG: an extended difference-of-Gaussians
        compendium".
    """
    side = min(images.shape[-2:])
    colours = images[:, : {2: 1, 4: 3}.get(images.shape[1], images.shape[1])]
    unit = max(1.0, side / 32)  # finer than pixels, there is nothing to see
    fine, coarse = (_edges(colours, width * unit) for width in (0.5, 0.6))
    share = draws[:, 0].view(-1, 1, 1, 1)
    strength = fine + share * (coarse - fine)
    threshold = 0.1 + 0.15 * draws[:, 1].view(-1, 1, 1, 1)
    ink = torch.sigmoid((strength - threshold) * 40)
    fields = draws[:, 3:].view(-1, 3, _GRID, _GRID)
    ink = _warp(ink, (2 * fields[:, :2] - 1) * 2 * wobble)
    mask = F.interpolate(fields[:, 2:], size=images.shape[-2:], mode="bicubic", align_corners=False)
    missing = dropped * draws[:, 2].view(-1, 1, 1, 1)
    return 1 - 2 * (ink * torch.sigmoid((mask - missing) * 20)).clamp(0, 1)


def _edges(images: Tensor, width: float) -> Tensor:
    """Return how much darker a pixel is than its surroundings, (B, 1, H, W), about 0 to 1.

    The channel in which the difference is largest counts.
    """
    near, far = _gaussian_blur(images, width), _gaussian_blur(images, 1.6 * width)
    return (far - near).amax(1, keepdim=True).clamp(min=0)


def _gaussian_blur(images: Tensor, width: float) -> Tensor:
    reach = max(1, math.ceil(3 * width))
    offsets = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    kernel = torch.softmax(-(offsets**2) / (2 * width**2), dim=0)
    channels = images.shape[1]
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    padded = F.conv2d(
        padded, kernel.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels
    )
    return F.conv2d(padded, kernel.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)


def _warp(maps: Tensor, offsets: Tensor) -> Tensor:
    """Displace maps (B, 1, H, W) by smooth fields (B, 2, g, g), given as shares of the side."""
    identity = torch.eye(2, 3, device=maps.device, dtype=maps.dtype).expand(len(maps), -1, -1)
    grid = F.affine_grid(identity, list(maps.shape), align_corners=False)
    field = F.interpolate(offsets, size=maps.shape[-2:], mode="bicubic", align_corners=False)
    return F.grid_sample(
        maps, grid + 2 * field.permute(0, 2, 3, 1), padding_mode="border", align_corners=False
    )
