"""Normalization with a per-image scale and shift."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.nn.initial import zeroed


class ModulatedGroupNorm(nn.Module):
    """Group norm followed by (1 + scale) * x + shift with scale and shift (B, C) projected from an embedding.

    Source: Perez et al. 2018 (arXiv:1709.07871); Dhariwal & Nichol 2021 (arXiv:2105.05233), sec. 3.1 (adaptive group norm).
    """

    def __init__(self, channels: int, embedding_size: int, group_channels: int = 16) -> None:
        super().__init__()
        self.groups = max(1, channels // group_channels)
        self.projection = zeroed(nn.Linear(embedding_size, 2 * channels))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, C, H, W), embedding (B, E) -> (B, C, H, W)."""
        scale, shift = self.projection(embedding).to(x.dtype)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, F.group_norm(x, self.groups), scale + 1)
