"""Metrics of images against line drawings, points and silhouettes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.conditioners.doodle import extract_lines

INK = 0.25  # above which a pixel of a drawing counts as drawn
FIELD_DRAWS = 51  # uniform draws that `extract_lines` takes for each image


def line_mask(images: Tensor) -> Tensor:
    """Return where an image's lines are, (n, 1, H, W) bool.

    They are those of `extract_lines`, without distortion and with none dropped.
    """
    draws = torch.full((len(images), FIELD_DRAWS), 0.5, dtype=images.dtype)
    return (1 - extract_lines(images, draws, wobble=0.0, dropped=0.0)) / 2 > INK


def line_f1(images: Tensor, ink: Tensor) -> Tensor:
    """Return the F1 of an image's lines against a drawing's, (n,), with one pixel of slack.

    It is the harmonic mean of the shares of each that lie on the other.
    """
    predicted, target = line_mask(images), ink.nan_to_num(0.0) > INK

    def share(mask: Tensor, reference: Tensor) -> Tensor:
        near = F.max_pool2d(reference.float(), 3, stride=1, padding=1) > 0
        return (mask & near).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)

    precision, recall = share(predicted, target), share(target, predicted)
    return (2 * precision * recall / (precision + recall).clamp(min=1e-9)).double()


def chamfer(images: Tensor, points: Tensor) -> Tensor:
    """Return the mean distance in pixels between points (n, N, D) and an image's lines, (n,).

    The distances from points to the nearest line and back are averaged. The value is the image's
    longer side if it has no lines, and NaN if there are no points.
    """
    height, width = images.shape[-2:]
    scale = points.new_tensor([width / 2, -height / 2])
    values = []
    for mask, cloud in zip(line_mask(images)[:, 0], points, strict=True):
        line_pixels = torch.nonzero(mask).flip(1).float() + 0.5
        targets = cloud[~cloud.isnan().any(1)][:, :2] * scale + points.new_tensor(
            [width / 2, height / 2]
        )
        if not len(targets):
            values.append(math.nan)
        elif not len(line_pixels):
            values.append(float(max(height, width)))
        else:
            distances = torch.cdist(targets, line_pixels)
            values.append(float(distances.amin(0).mean() + distances.amin(1).mean()) / 2)
    return torch.tensor(values, dtype=torch.float64)


def silhouette(images: Tensor) -> Tensor:
    """Return what is not background, (n, H, W) bool: pixels unlike the image's corners."""
    corners = torch.stack([images[..., y, x] for y in (0, -1) for x in (0, -1)]).median(0).values
    return (images - corners[..., None, None]).abs().amax(1) > 0.25


def silhouette_iou(images: Tensor, real: Tensor) -> Tensor:
    """Return the intersection of the silhouettes over their union, (n,)."""
    generated, target = silhouette(images), silhouette(real)
    union = (generated | target).flatten(1).sum(1)
    return ((generated & target).flatten(1).sum(1) / union.clamp(min=1)).double()
