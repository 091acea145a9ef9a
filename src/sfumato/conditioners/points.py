"""Point clouds: any number of points in any order, as a few tokens, and as a map of where they
lie.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sfumato import randomness
from sfumato.condition import Condition, ContextSizes
from sfumato.conditioners.protocol import Conditioner
from sfumato.config.bounds import Count, Fraction, Positive, Size
from sfumato.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SplatConfig:
    """Also draw the points on a map: their first two coordinates, x right and y up, the image from
    -1 to 1.

    Attributes:
        side: of the map, in pixels.
        width: of a point's spot, in pixels of the map (standard deviation).
    """

    side: Size = 32
    width: Positive = 0.7


@dataclass(frozen=True, kw_only=True)
class PointsConfig:
    """Steer by point clouds.

    Attributes:
        size: channels of tokens and of their summary.
        tokens: number of tokens that a cloud is encoded as, however many points it has.
        layers, heads: of the transformer between the tokens.
        frame: `image` takes coordinates as they are, `normalized` centres each cloud and scales it to fit
            from -1 to 1.
        min_points: smallest number of points that training clouds are randomly subsampled to, so
            that the model works with any number.
        splat: a map of the points in addition to the tokens; None for none.
        dropout: share of training samples whose points are hidden.
    """

    size: Size = 128
    tokens: Size = 16
    layers: Size = 2
    heads: Size = 4
    frame: Literal["image", "normalized"] = "image"
    min_points: Count = 64
    splat: SplatConfig | None = None
    dropout: Fraction = 0.1

    def __post_init__(self) -> None:
        if (
            min(self.size, self.tokens, self.layers, self.heads, self.min_points) < 1
            or self.size % self.heads
        ):
            raise ConfigError(
                f"{self}",
                where="conditioner.points",
                hint="all counts are at least 1, and heads divide size",
            )


class PointsConditioner(Conditioner):
    """context["points"] (B, N, D) -> Condition.vector (B, size), tokens (B, tokens, size), map.

    Rows of NaN are not points. The result depends neither on the order of the points nor on how
    many rows of NaN follow them.

    Source: Qi et al. 2017 (arXiv:1612.00593); Jaegle et al. 2021 (arXiv:2103.03206).
    """

    frequencies: Tensor

    def __init__(self, config: PointsConfig, *, dimensions: int) -> None:
        super().__init__()
        self.config, self.dimensions, self.dropout = config, dimensions, config.dropout
        self.sizes = ContextSizes(
            vector=config.size, tokens=config.size, spatial=2 if config.splat is not None else 0
        )
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(6), persistent=False)
        self.point = nn.Sequential(
            nn.Linear(dimensions * (1 + 2 * 6), config.size),
            nn.GELU(),
            nn.Linear(config.size, config.size),
            nn.GELU(),
        )
        self.latents = nn.Parameter(torch.randn(config.tokens, config.size) * 0.02)
        self.nothing = nn.Parameter(torch.randn(config.tokens, config.size) * 0.02)
        self.gather = nn.MultiheadAttention(config.size, config.heads, batch_first=True)
        layer = nn.TransformerEncoderLayer(
            config.size,
            config.heads,
            4 * config.size,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.transformer = nn.TransformerEncoder(
            layer, config.layers, norm=nn.LayerNorm(config.size), enable_nested_tensor=False
        )
        self.summary = nn.Linear(2 * config.size, config.size)

    def forward(self, context: Mapping[str, Any], batch_size: int) -> Condition:
        """Encode the clouds; one without points, or a missing context, gives the null condition."""
        if "points" not in context:
            return self.null(batch_size)
        points = context["points"].to(self.nothing.device)
        absent = points.isnan().any(2)
        missing = absent.all(1)
        absent = absent & ~missing[:, None]  # attention over nothing has no value
        points = normalize_frame(points, self.config.frame).nan_to_num(0.0)
        features = self.point(self._fourier_features(points))
        gathered, _ = self.gather(
            self.latents.expand(len(points), -1, -1),
            features,
            features,
            key_padding_mask=absent,
            need_weights=False,
        )
        tokens = self.transformer(self.latents + gathered)
        highest = features.masked_fill(absent[..., None], -math.inf).amax(1)
        slots = Condition(
            vector=self.summary(torch.cat([tokens.mean(1), highest], dim=1)),
            tokens=tokens,
            spatial=self._splat(points, absent),
        )
        return slots.replace_where(missing, self.null(batch_size))

    def null(self, batch_size: int) -> Condition:
        """Return the learned tokens of no points, their summary and, if any, maps of zeros."""
        tokens = self.nothing.expand(batch_size, -1, -1)
        spatial = None if self.config.splat is None else tokens.new_zeros(batch_size, 2, 1, 1)
        mean = tokens.mean(1)
        return Condition(
            vector=self.summary(torch.cat([mean, mean], dim=1)), tokens=tokens, spatial=spatial
        )

    def training_context(
        self, images: Tensor, context: Mapping[str, Any], *, seed: int, first: int
    ) -> dict[str, Any]:
        """Subsample each training cloud (B, N, D) to a random number of points, `min_points` or more.

        Smaller clouds stay complete. Removed points become NaN, as after a cloud with fewer points.
        Draws are keyed by the samples' numbers.
        """
        if "points" not in context:
            return {}
        points = context["points"]
        count, most = points.shape[:2]
        draws = randomness.uniform(seed, "points", first=first, count=count, per_item=most + 1).to(
            points
        )
        absent = points.isnan().any(2)
        num_points = (~absent).sum(1, keepdim=True)
        least = num_points.clamp(max=self.config.min_points)
        num_kept = least + (num_points - least) * draws[:, :1]
        rank = draws[:, 1:].masked_fill(absent, 2.0).argsort(1).argsort(1)
        return {"points": points.masked_fill((rank >= num_kept)[..., None], torch.nan)}

    def _fourier_features(self, points: Tensor) -> Tensor:
        """Append sines and cosines to the coordinates: (B, N, D) -> (B, N, 13 D)."""
        angles = (points[..., None] * self.frequencies).flatten(2)
        return torch.cat([points, angles.sin(), angles.cos()], dim=2)

    def _splat(self, points: Tensor, absent: Tensor) -> Tensor | None:
        """Return maps (B, 2, side, side): the sum of the points' spots, at most 1, and ones.

        A spot is 1 on its point and falls to 0 far away.
        """
        splat = self.config.splat
        if splat is None:
            return None
        places = (torch.arange(splat.side, device=points.device, dtype=points.dtype) + 0.5) * (
            2 / splat.side
        ) - 1
        scale = splat.side / 2 / splat.width
        x = torch.exp(-0.5 * ((points[..., :1] - places) * scale) ** 2) * (~absent[..., None])
        y = torch.exp(-0.5 * ((points[..., 1:2] + places) * scale) ** 2)
        spots = torch.einsum("bnh,bnw->bhw", y, x).clamp(max=1)[:, None]
        return torch.cat([spots, torch.ones_like(spots)], dim=1)


def normalize_frame(points: Tensor, frame: str) -> Tensor:
    """Return points (B, N, D) in the frame that the model was trained on.

    Coordinates beyond the third are features, and stay.
    """
    if frame == "image":
        return points
    space = points[..., :3]
    low, high = (
        space.nan_to_num(bound).amin(1, keepdim=True)
        if bound > 0
        else space.nan_to_num(bound).amax(1, keepdim=True)
        for bound in (math.inf, -math.inf)
    )
    half = ((high - low) / 2).amax(2, keepdim=True).clamp(min=1e-6)
    return torch.cat([(space - (low + high) / 2) / half, points[..., 3:]], dim=2)
