"""Whether samples are copies of training images.

Distances to the nearest ones are compared with those of held-out images.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

COPY_RATIO = 1 / 3


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """L2 distances of each image to its nearest and second nearest training image, (n,).

    `index` numbers the nearest training image.
    """

    first: Tensor
    second: Tensor
    index: Tensor

    @property
    def copies(self) -> float:
        """The share of images far closer to one training image than to any other: d1/d2 < 1/3.

        Source: Yoon et al. 2023 (ICML workshop, "Diffusion probabilistic models generalize when
            they fail to memorize").
        """
        return float((self.first < COPY_RATIO * self.second).double().mean())


def nearest(images: Tensor, training: Tensor, *, chunk: int = 2048) -> Neighbours:
    """Find the nearest training images of `images` (n, C, H, W).

    Memory grows with n x chunk, not with the training set. Equal training images count as one: a
    copy of an image that appears there twice is still a copy.
    """
    flat, distinct = images.flatten(1).float(), _distinct(training)
    distances = torch.full((len(flat), 0), 0.0)
    indices = torch.zeros((len(flat), 0), dtype=torch.long)
    for numbers in distinct.split(chunk):
        part = torch.cdist(flat, training[numbers].flatten(1).float())
        distances, indices = (
            torch.cat([distances, part], 1),
            torch.cat([indices, numbers.expand_as(part)], 1),
        )
        distances, order = distances.topk(min(2, distances.shape[1]), largest=False)
        indices = indices.gather(1, order)
    return Neighbours(first=distances[:, 0], second=distances[:, -1], index=indices[:, 0])


def _distinct(training: Tensor) -> Tensor:
    """Return the index of the first of each group of equal images, in ascending order."""
    firsts: dict[bytes, int] = {}
    for number, image in enumerate(training.numpy()):
        firsts.setdefault(hashlib.sha256(image.tobytes()).digest(), number)
    return torch.tensor(list(firsts.values()))
