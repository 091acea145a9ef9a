"""Are samples copies of training pictures? Distances to the nearest ones, beside those of held-out pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

COPY_RATIO = 1 / 3


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Of each picture: L2 distance to the nearest and second nearest training picture, and which the nearest is, (n,)."""

    first: Tensor
    second: Tensor
    index: Tensor

    @property
    def copies(self) -> float:
        """Share of pictures far closer to one training picture than to any other: d1/d2 < 1/3.

        Source: Yoon et al. 2023 (ICML workshop, "Diffusion probabilistic models generalize when they fail to memorize").
        """
        return float((self.first < COPY_RATIO * self.second).double().mean())


def nearest(images: Tensor, training: Tensor, *, chunk: int = 2048) -> Neighbours:
    """Nearest training pictures of `images` (n, C, H, W); memory grows with n x chunk, not with the training set."""
    flat = images.flatten(1).float()
    distances = torch.full((len(flat), 0), 0.0)
    indices = torch.zeros((len(flat), 0), dtype=torch.long)
    for first in range(0, len(training), chunk):
        part = torch.cdist(flat, training[first : first + chunk].flatten(1).float())
        numbers = torch.arange(first, first + part.shape[1]).expand_as(part)
        distances, indices = torch.cat([distances, part], 1), torch.cat([indices, numbers], 1)
        distances, order = distances.topk(min(2, distances.shape[1]), largest=False)
        indices = indices.gather(1, order)
    return Neighbours(first=distances[:, 0], second=distances[:, -1], index=indices[:, 0])
