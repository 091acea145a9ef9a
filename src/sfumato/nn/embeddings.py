"""Embeddings of numbers as vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

TIMESTEPS = 1000.0  # that noise levels from 0 to 1 are scaled to, as in DDPM


class SinusoidalEmbedding(nn.Module):
    """cos and sin of scale * x at geometric frequencies from 1 down to about 1/max_period, as in
    transformers.

    `scale` brings x to the range that the frequencies can distinguish: 1000 for a noise level from
    0 to 1, as timesteps have it.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), sec. 3.5.
    """

    frequencies: Tensor

    def __init__(self, size: int, max_period: float = 10_000.0, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        exponents = torch.arange(size // 2, dtype=torch.float32) / (size // 2)
        self.register_buffer(
            "frequencies", torch.exp(-math.log(max_period) * exponents), persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """Embed numbers: (B,) -> (B, size), cosines first."""
        angles = (self.scale * x.float())[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1)
