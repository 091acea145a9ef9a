"""Augmentation of training images, each change a function of the seed and the sample's number.

All changes together are one affine map of the plane and one affine map of the colours, so that an
image is resampled once, however many are on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sfumato import randomness
from sfumato.config.bounds import FractionBelowOne, NonNegative
from sfumato.errors import ConfigError

LABELS = 9  # numbers that tell the network what the non-leaking pipeline did
_SCALE, _TRANSLATION = 2**0.2, 1 / 8
_LUMA = (0.2126, 0.7152, 0.0722)  # Rec. 709


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What may be changed; everything is off by default. Every change but the non-leaking ones is
    learned as part of the data.

    Attributes:
        flip: mirror half of the images left to right, top to bottom, or each of the two.
        quarter_turns: turn by a random multiple of 90 degrees; images must be square.
        rotation_degrees: turn by up to so much either way.
        crop: cut away up to this share of each side at random, and enlarge the rest.
        brightness, contrast, saturation: change by up to this share.
        hue_degrees: turn colours by up to so much either way.
        karras: probability of each non-leaking augmentation of Karras et al. 2022 (0.12 for small
            sets): flips, scaling, rotation, stretching, translation. The network is conditioned on
            what was done, and samples with nothing done.
    """

    flip: Literal["none", "horizontal", "vertical", "both"] = "none"
    quarter_turns: Literal["none", "all"] = "none"
    rotation_degrees: NonNegative = 0.0
    crop: FractionBelowOne = 0.0
    brightness: FractionBelowOne = 0.0
    contrast: FractionBelowOne = 0.0
    saturation: FractionBelowOne = 0.0
    hue_degrees: NonNegative = 0.0
    karras: FractionBelowOne = 0.0

    def __post_init__(self) -> None:
        shares = {
            name: getattr(self, name)
            for name in ("crop", "brightness", "contrast", "saturation", "karras")
        }
        for name, share in shares.items():
            if not 0 <= share < 1:
                raise ConfigError(
                    f"{name} = {share}",
                    where="data.augment",
                    hint="use a share from 0 up to, not including, 1",
                )
        for name in ("rotation_degrees", "hue_degrees"):
            if not 0 <= getattr(self, name) <= 180:
                raise ConfigError(
                    f"{name} = {getattr(self, name)}", where="data.augment", hint="use 0 to 180"
                )

    @property
    def is_off(self) -> bool:
        """Whether images stay as they are."""
        return all(getattr(self, field.name) in (0.0, "none") for field in fields(self))

    @property
    def labels(self) -> int:
        """The number of labels that tell the network what was done; 0 if `karras` is 0."""
        return LABELS if self.karras else 0


class Augmented(NamedTuple):
    """Augmented images (B, C, H, W), the labels that tell the network what was done (B, 0 or 9),
    and the maps and points, moved along with the images.
    """

    images: Tensor
    labels: Tensor
    annotations: dict[str, Tensor]


def augmentation_draws(seed: int | str, *, first: int, count: int) -> Tensor:
    """Draw uniform numbers (count, 24) for samples `first`, `first + 1`, ..."""
    return randomness.uniform(seed, "augment", first=first, count=count, per_item=24)


def augment(
    config: AugmentConfig,
    images: Tensor,
    draws: Tensor,
    *,
    annotations: Mapping[str, Tensor] | None = None,
) -> Augmented:
    """Augment images (B, C, H, W) in [-1, 1], each by its own draws (B, 24).

    C may be 0 where only what lies over the images is needed.

    Args:
        annotations: what lies over the images and keeps its place on them: maps (B, c, H, W), or
            points (B, N, D) whose first two coordinates are x to the right and y upwards, with the
            image from -1 to 1.
    Raises:
        ConfigError: for quarter turns of images that are not square.
    """
    annotations = annotations or {}
    if config.is_off:
        return Augmented(images, images.new_zeros(len(images), 0), dict(annotations))
    plane = _compose(
        _draw_rotation(config, draws[:, 3]), _draw_crop(config, draws[:, 4:7], *_sides(images))
    )
    labels = images.new_zeros(len(images), 0)
    if config.karras:
        map_, labels = non_leaking(config.karras, draws[:, 11:24])
        plane, labels = _compose(plane, map_), labels.to(images.dtype)

    def transform(maps: Tensor) -> Tensor:
        if not maps.shape[1]:
            return maps
        maps = _flip_and_turn(config, maps, draws[:, :3])
        return (
            warp(maps, plane) if config.rotation_degrees or config.crop or config.karras else maps
        )

    sides = _sides(images)
    annotations = {
        name: transform(value)
        if value.ndim == 4
        else _move_points(value, plane, _flip_and_turn_matrix(config, draws[:, :3]), *sides)
        for name, value in annotations.items()
    }
    colours = _draw_colour_matrix(config, draws[:, 7:11], images.shape[1])
    images = transform(images)
    return Augmented(
        images if colours is None else _apply_colour_matrix(images, colours), labels, annotations
    )


def _move_points(
    points: Tensor, plane: Tensor, exact: Tensor, width: float, height: float
) -> Tensor:
    """Move points (B, N, D) to where the image's pixels went.

    `plane` maps output to input coordinates; `exact`, applied before it, maps input to output.
    """
    forward = (torch.linalg.inv(plane) @ exact).to(points.dtype)
    scale = points.new_tensor([width, -height])
    at = points[..., :2] * scale
    at = (at @ forward[:, :2, :2].transpose(1, 2) + forward[:, None, :2, 2]) / scale
    return torch.cat([at, points[..., 2:]], dim=2)


def _flip_and_turn_matrix(config: AugmentConfig, draws: Tensor) -> Tensor:
    """Return what `_flip_and_turn` does, (B, 3, 3) from input to output; y points down."""

    def sign(flips: tuple[str, str], draw: Tensor) -> Tensor:
        return torch.where((draw < 0.5) & (config.flip in flips), -1.0, 1.0).to(torch.float64)

    turns = (draws[:, 2] * 4).long() * (config.quarter_turns == "all")
    mirrored = _scale_matrix(
        sign(("horizontal", "both"), draws[:, 0]), sign(("vertical", "both"), draws[:, 1])
    )
    return _compose(_rotation_matrix(-turns * (math.pi / 2)), mirrored)


def _flip_and_turn(config: AugmentConfig, images: Tensor, draws: Tensor) -> Tensor:
    """Flip and quarter-turn images: pixels move, and keep their values."""

    def where(mask: Tensor, changed: Tensor, images: Tensor) -> Tensor:
        return torch.where(mask.view(-1, 1, 1, 1), changed, images)

    if config.flip in ("horizontal", "both"):
        images = where(draws[:, 0] < 0.5, images.flip(-1), images)
    if config.flip in ("vertical", "both"):
        images = where(draws[:, 1] < 0.5, images.flip(-2), images)
    if config.quarter_turns == "all":
        if images.shape[-1] != images.shape[-2]:
            raise ConfigError(
                "quarter turns of images that are not square",
                where="data.augment",
                hint="set quarter_turns=none",
            )
        turns = (draws[:, 2] * 4).long()
        for turn in (1, 2, 3):
            images = where(turns == turn, images.rot90(turn, (-2, -1)), images)
    return images


# Maps of the plane are (B, 3, 3) matrices from output to input coordinates, in which the shorter
# side runs from -1 to 1.


def _identity(count: int) -> Tensor:
    return torch.eye(3, dtype=torch.float64).repeat(count, 1, 1)


def _compose(*maps: Tensor) -> Tensor:
    result = maps[0]
    for following in maps[1:]:
        result = result @ following
    return result


def _rotation_matrix(angle: Tensor) -> Tensor:
    matrix = _identity(len(angle))
    cos, sin = torch.cos(angle), torch.sin(angle)
    matrix[:, 0, 0], matrix[:, 0, 1], matrix[:, 1, 0], matrix[:, 1, 1] = cos, -sin, sin, cos
    return matrix


def _scale_matrix(x: Tensor, y: Tensor) -> Tensor:
    matrix = _identity(len(x))
    matrix[:, 0, 0], matrix[:, 1, 1] = x, y
    return matrix


def _translation_matrix(x: Tensor, y: Tensor) -> Tensor:
    matrix = _identity(len(x))
    matrix[:, 0, 2], matrix[:, 1, 2] = x, y
    return matrix


def _draw_rotation(config: AugmentConfig, draw: Tensor) -> Tensor:
    return _rotation_matrix((2 * draw - 1) * math.radians(config.rotation_degrees))


def _sides(images: Tensor) -> tuple[float, float]:
    """Return width and height in units of the shorter side."""
    height, width = images.shape[-2:]
    return width / min(height, width), height / min(height, width)


def _draw_crop(config: AugmentConfig, draws: Tensor, width: float, height: float) -> Tensor:
    scale = 1 - config.crop * draws[:, 0]
    margin = 1 - scale
    x, y = (width * margin * (2 * draws[:, 1] - 1), height * margin * (2 * draws[:, 2] - 1))
    return _compose(_translation_matrix(x, y), _scale_matrix(scale, scale))


def non_leaking(probability: float, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Return maps (B, 3, 3), from output to input, and labels (B, 9) for uniform draws (B, 13).

    Images are mirrored left to right with probability 1/2; each other change is drawn with
    `probability`, and a drawn flip upside down is applied half of the time.

    Source: Karras et al. 2022 (arXiv:2206.00364), appendix F.2 and table 6.
    """
    on = (draws[:, :6] < torch.tensor([0.5, *[probability] * 5])).to(draws.dtype)
    mirrored, upside_down = on[:, 0], on[:, 1] * (draws[:, 6] < 0.5)
    zoom = on[:, 2] * _normal(draws[:, 7])
    angle = on[:, 3] * (2 * draws[:, 8] - 1) * math.pi
    axis, stretch = on[:, 4] * (2 * draws[:, 9] - 1) * math.pi, on[:, 4] * _normal(draws[:, 10])
    x, y = on[:, 5] * _normal(draws[:, 11]), on[:, 5] * _normal(draws[:, 12])
    forward = _compose(
        _translation_matrix(2 * _TRANSLATION * x, 2 * _TRANSLATION * y),
        _rotation_matrix(axis),
        _scale_matrix(_SCALE**stretch, _SCALE**-stretch),
        _rotation_matrix(-axis),
        _rotation_matrix(-angle),
        _scale_matrix(_SCALE**zoom, _SCALE**zoom),
        _scale_matrix(1 - 2 * mirrored, 1 - 2 * upside_down),
    )  # fmt: skip
    labels = [mirrored, upside_down, zoom, torch.cos(angle) - 1, torch.sin(angle)]
    labels += [stretch * torch.cos(axis), stretch * torch.sin(axis), x, y]
    return torch.linalg.inv(forward), torch.stack(labels, dim=1)


def _normal(uniform: Tensor) -> Tensor:
    result: Tensor = torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9))
    return result


def warp(images: Tensor, maps: Tensor) -> Tensor:
    """Resample images (B, C, H, W) in [-1, 1] by maps (B, 3, 3), bicubically.

    Outside of the image, its reflection is sampled; values are clamped to [-1, 1].
    """
    proportions = torch.diag(torch.tensor([*_sides(images), 1.0], dtype=torch.float64))
    theta = torch.linalg.inv(proportions) @ maps @ proportions
    grid = torch.nn.functional.affine_grid(
        theta[:, :2].to(images.dtype), list(images.shape), align_corners=False
    )
    sampled = torch.nn.functional.grid_sample(
        images, grid, mode="bicubic", padding_mode="reflection", align_corners=False
    )
    return sampled.clamp(-1, 1)


def _draw_colour_matrix(
    config: AugmentConfig, draws: Tensor, channels: int
) -> tuple[Tensor, Tensor] | None:
    """Return matrices (B, c, c) and offsets (B, c) for c colour channels; None for no change."""
    if not channels or not (
        config.brightness or config.contrast or config.saturation or config.hue_degrees
    ):
        return None
    colours = {2: 1, 4: 3}.get(channels, channels)
    way = 2 * draws - 1
    gain = 1 + config.contrast * way[:, 1]
    matrix = torch.eye(colours, dtype=torch.float64).repeat(len(draws), 1, 1) * gain.view(-1, 1, 1)
    offset = (2 * config.brightness * way[:, 0]).view(-1, 1).repeat(1, colours)
    if colours == 3:
        gray = torch.tensor(_LUMA, dtype=torch.float64).expand(3, 3)
        keep = (1 + config.saturation * way[:, 2]).view(-1, 1, 1)
        matrix = (
            (keep * torch.eye(3, dtype=torch.float64) + (1 - keep) * gray)
            @ _hue(way[:, 3] * math.radians(config.hue_degrees))
            @ matrix
        )
    return matrix, offset


def _hue(angle: Tensor) -> Tensor:
    """Rotate colours about the gray axis (Rodrigues' formula): matrices (B, 3, 3)."""
    axis = torch.full((3,), 3**-0.5, dtype=torch.float64)
    cross = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64) * 3**-0.5
    cos, sin = torch.cos(angle).view(-1, 1, 1), torch.sin(angle).view(-1, 1, 1)
    return (
        cos * torch.eye(3, dtype=torch.float64) + sin * cross + (1 - cos) * torch.outer(axis, axis)
    )


def _apply_colour_matrix(images: Tensor, colours: tuple[Tensor, Tensor]) -> Tensor:
    matrix, offset = (value.to(images.dtype) for value in colours)
    count = matrix.shape[1]
    changed = torch.einsum("bij,bjhw->bihw", matrix, images[:, :count]) + offset[:, :, None, None]
    return torch.cat([changed.clamp(-1, 1), images[:, count:]], dim=1)
