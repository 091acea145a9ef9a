"""Figures of images against line drawings, points and silhouettes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.conditioners.doodle import lines

INK = 0.25  # above which a pixel of a drawing counts as drawn
FIELD_DRAWS = 51  # uniform draws that `lines` takes for each image


def drawn(images: Tensor) -> Tensor:
    """Where an image's lines are, (n, 1, H, W) bool: the line drawing that doodles are made with,
    nothing bent and nothing dropped.
    """
    draws = torch.full((len(images), FIELD_DRAWS), 0.5, dtype=images.dtype)
    return (1 - lines(images, draws, wobble=0.0, dropped=0.0)) / 2 > INK


def line_f1(images: Tensor, ink: Tensor) -> Tensor:
    """F1 of an image's lines against a drawing's, one pixel of slack: harmonic mean of the shares
    of each that lie on the other.
    """
    mine, asked = drawn(images), ink.nan_to_num(0.0) > INK

    def share(of: Tensor, on: Tensor) -> Tensor:
        near = F.max_pool2d(on.float(), 3, stride=1, padding=1) > 0
        return (of & near).flatten(1).sum(1) / of.flatten(1).sum(1).clamp(min=1)

    precision, recall = share(mine, asked), share(asked, mine)
    return (2 * precision * recall / (precision + recall).clamp(min=1e-9)).double()


def chamfer(images: Tensor, points: Tensor) -> Tensor:
    """Mean distance in pixels from points (n, N, D) to the nearest line of an image and back; its
    side if it has no lines.
    """
    height, width = images.shape[-2:]
    scale = points.new_tensor([width / 2, -height / 2])
    values = []
    for lined, cloud in zip(drawn(images)[:, 0], points, strict=True):
        at = torch.nonzero(lined).flip(1).float() + 0.5
        wanted = cloud[~cloud.isnan().any(1)][:, :2] * scale + points.new_tensor(
            [width / 2, height / 2]
        )
        if not len(wanted):
            values.append(math.nan)
        elif not len(at):
            values.append(float(max(height, width)))
        else:
            away = torch.cdist(wanted, at)
            values.append(float(away.amin(0).mean() + away.amin(1).mean()) / 2)
    return torch.tensor(values, dtype=torch.float64)


def silhouette(images: Tensor) -> Tensor:
    """What is not background, (n, H, W) bool: pixels unlike the image's corners."""
    corners = torch.stack([images[..., y, x] for y in (0, -1) for x in (0, -1)]).median(0).values
    return (images - corners[..., None, None]).abs().amax(1) > 0.25


def silhouette_iou(images: Tensor, real: Tensor) -> Tensor:
    """Overlap of the silhouettes over their union."""
    mine, theirs = silhouette(images), silhouette(real)
    union = (mine | theirs).flatten(1).sum(1)
    return ((mine & theirs).flatten(1).sum(1) / union.clamp(min=1)).double()
