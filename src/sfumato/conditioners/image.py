"""Images as context: aligned with the image to generate (super-resolution, colourization,
inpainting), or encoded as tokens (variations).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato import randomness
from sfumato.condition import Condition, ContextSizes
from sfumato.conditioners.protocol import Conditioner
from sfumato.config.bounds import Fraction, Size
from sfumato.errors import ConfigError


class Degradation(Protocol):
    """How images are degraded, which the model learns to undo; NaN where a pixel is unknown."""

    def degrade(self, images: Tensor, draws: Tensor) -> Tensor:
        """Degrade training images (B, C, H, W) in [-1, 1]; draws (B, 8) are uniform in [0, 1)."""
        ...

    def degrade_input(self, images: Tensor) -> Tensor:
        """Degrade a user's images (B, C, H, W) in [-1, 1], which may be degraded already."""
        ...


@dataclass(frozen=True, kw_only=True)
class Downsample:
    """Reduce detail: the image at 1/factor of the resolution (super-resolution).

    Attributes:
        factor: side of an image over that of the small one.
    """

    factor: Size = 4

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ConfigError(
                f"factor = {self.factor}",
                where="conditioner.image.degradation.factor",
                hint="use 2 or more; 4 is usual",
            )

    def degrade(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return `degrade_input(images)`, the same for every draw."""
        return self.degrade_input(images)

    def degrade_input(self, images: Tensor) -> Tensor:
        """Average over blocks of factor x factor pixels, and upsample the result bilinearly."""
        height, width = images.shape[-2:]
        small = F.adaptive_avg_pool2d(
            images, (max(1, height // self.factor), max(1, width // self.factor))
        )
        return F.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)


@dataclass(frozen=True, kw_only=True)
class Grayscale:
    """Remove colour (colourization)."""

    def degrade(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return `degrade_input(images)`, the same for every draw."""
        return self.degrade_input(images)

    def degrade_input(self, images: Tensor) -> Tensor:
        """Replace each colour by the mean of all.

        A second or fourth channel, which is alpha or infrared, stays.
        """
        colours = images.shape[1] - (images.shape[1] in (2, 4))
        gray = images[:, :colours].mean(1, keepdim=True).expand(-1, colours, -1, -1)
        return torch.cat([gray, images[:, colours:]], dim=1)


@dataclass(frozen=True, kw_only=True)
class Holes:
    """Cut out parts of the image (inpainting).

    Attributes:
        smallest, largest: sides of the rectangle that is cut out, as shares of the image's.
        outside: share of samples in which only the rectangle is kept, and its surroundings are to
            be generated (outpainting).
    """

    smallest: Fraction = 0.2
    largest: Fraction = 0.8
    outside: Fraction = 0.2

    def degrade(self, images: Tensor, draws: Tensor) -> Tensor:
        """Set a rectangle at a random place to NaN.

        For a share `outside` of the images, everything but the rectangle.
        """
        height, width = images.shape[-2:]
        sides = self.smallest + (self.largest - self.smallest) * draws[:, :2]
        top, left = ((1 - sides[:, i]) * draws[:, 2 + i] for i in (0, 1))
        y = ((torch.arange(height, device=images.device) + 0.5) / height).view(1, -1, 1)
        x = ((torch.arange(width, device=images.device) + 0.5) / width).view(1, 1, -1)
        top, left, tall, wide = (
            value.view(-1, 1, 1) for value in (top, left, sides[:, 0], sides[:, 1])
        )
        hole = (y >= top) & (y < top + tall) & (x >= left) & (x < left + wide)
        hole = hole ^ (draws[:, 4] < self.outside).view(-1, 1, 1)
        return images.masked_fill(hole[:, None], torch.nan)

    def degrade_input(self, images: Tensor) -> Tensor:
        """Return the images unchanged: the user's mask was applied already."""
        return images


DegradationConfig = Downsample | Grayscale | Holes


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Steer by a degraded image, which the model restores.

    Attributes:
        degradation: how training images are degraded.
        dropout: share of training samples whose degraded image is hidden.
    """

    degradation: DegradationConfig = Downsample()
    dropout: Fraction = 0.1


class ImageConditioner(Conditioner):
    """context["image"] (B, C, H, W) in [-1, 1] -> Condition.spatial (B, C + 1, H, W).

    The image is NaN where unknown; the maps are its pixels, and 1 where all of a pixel is known.
    """

    nothing: Tensor

    def __init__(self, config: ImageConfig, *, channels: int) -> None:
        super().__init__()
        self.config, self.dropout = config, config.dropout
        self.sizes = ContextSizes(spatial=channels + 1)
        self.register_buffer("nothing", torch.zeros(1, channels + 1, 1, 1), persistent=False)

    def forward(self, context: Mapping[str, Any], batch_size: int) -> Condition:
        """Return pixels, 0 where unknown, and which are known; without a context, return `null`."""
        if "image" not in context:
            return self.null(batch_size)
        image = context["image"].to(self.nothing.device)
        known = (~image.isnan().any(1, keepdim=True)).to(image.dtype)
        return Condition(spatial=torch.cat([image.nan_to_num(0.0) * known, known], dim=1))

    def null(self, batch_size: int) -> Condition:
        """Return maps of zeros, (B, C + 1, 1, 1): no pixel is known."""
        return Condition(spatial=self.nothing.expand(batch_size, -1, -1, -1))

    def training_context(
        self, images: Tensor, context: Mapping[str, Any], *, seed: int, first: int
    ) -> dict[str, Any]:
        """Return the training images degraded; draws are keyed by the samples' numbers."""
        draws = randomness.uniform(seed, "image", first=first, count=len(images), per_item=8).to(
            images
        )
        return {"image": self.config.degradation.degrade(images, draws)}


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Make variations of a reference image, which is encoded as a few tokens.

    Attributes:
        size: channels of tokens and of their summary.
        side: the image is encoded as side x side tokens; fewer allow more variation.
        dropout: share of training samples whose reference is hidden.
    """

    size: Size = 128
    side: Size = 4
    dropout: Fraction = 0.1

    def __post_init__(self) -> None:
        if self.side < 1 or self.size < 1:
            raise ConfigError(
                f"{self}", where="conditioner.reference", hint="size and side are at least 1"
            )


class ReferenceConditioner(Conditioner):
    """context["reference"] (B, C, H, W) in [-1, 1] -> Condition.vector (B, size), tokens (B,
    side^2, size).

    An image with NaN stands for no reference, and gets the null condition.
    """

    def __init__(self, config: ReferenceConfig, *, channels: int) -> None:
        super().__init__()
        self.config, self.dropout = config, config.dropout
        self.sizes = ContextSizes(vector=config.size, tokens=config.size)
        self.see = nn.Sequential(
            nn.Conv2d(channels, config.size // 2, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(config.size // 2, config.size, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(config.size, config.size, 3, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(config.side),
        )
        self.positions = nn.Parameter(torch.randn(config.side**2, config.size) * 0.02)
        self.nothing = nn.Parameter(torch.randn(config.side**2, config.size) * 0.02)
        self.summary = nn.Linear(config.size, config.size)

    def forward(self, context: Mapping[str, Any], batch_size: int) -> Condition:
        """Encode the images as tokens and a summary; without a context, return `null`."""
        if "reference" not in context:
            return self.null(batch_size)
        reference = context["reference"].to(self.nothing.device)
        missing = reference.isnan().flatten(1).any(1)
        tokens = self.see(reference.nan_to_num(0.0)).flatten(2).transpose(1, 2) + self.positions
        return self._condition(tokens).replace_where(missing, self.null(batch_size))

    def null(self, batch_size: int) -> Condition:
        """Return the learned tokens of no image, and their summary."""
        return self._condition(self.nothing.expand(batch_size, -1, -1))

    def training_context(
        self, images: Tensor, context: Mapping[str, Any], *, seed: int, first: int
    ) -> dict[str, Any]:
        """Return the training images themselves."""
        return {"reference": images}

    def _condition(self, tokens: Tensor) -> Condition:
        return Condition(vector=self.summary(tokens.mean(1)), tokens=tokens)
