"""Normalizations: of groups with a per-image scale and shift, and by the root mean square."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.nn.init import zero_init

RMS_EPS = 1e-6


def num_groups(channels: int, group_channels: int) -> int:
    """Return the number of groups to normalize channels in.

    It is the largest divisor of `channels` with at least `group_channels` in each group, or 1.
    """
    return next(
        groups
        for groups in range(max(1, channels // group_channels), 0, -1)
        if channels % groups == 0
    )


class ModulatedGroupNorm(nn.Module):
    """Group norm followed by (1 + scale) * x + shift, with scale and shift (B, C) projected from an
    embedding.

    Source: Perez et al. 2018 (arXiv:1709.07871); Dhariwal & Nichol 2021 (arXiv:2105.05233), sec.
        3.1 (adaptive group norm).
    """

    def __init__(self, channels: int, embedding_size: int, group_channels: int = 16) -> None:
        super().__init__()
        self.groups = num_groups(channels, group_channels)
        self.projection = zero_init(nn.Linear(embedding_size, 2 * channels))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Normalize x (B, C, H, W), modulated by embedding (B, E) -> (B, C, H, W)."""
        scale, shift = self.projection(embedding).to(x.dtype)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, F.group_norm(x, self.groups), scale + 1)


def rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Divide x (..., C) by its root mean square along the last axis, and multiply by weight (C,).

    PyTorch's kernel is used except on a CPU, where it is not fused and goes through float32 four
    times: written out, the forward and backward pass take half as long there (docs/benchmarks.md).

    Source: Zhang & Sennrich 2019 (arXiv:1910.07467), eq. 4.
    """
    weight = None if weight is None else weight.to(x.dtype)
    if x.device.type != "cpu":
        return F.rms_norm(x, x.shape[-1:], weight, RMS_EPS)
    mean = x.square().mean(-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    scaled = x * (mean + RMS_EPS).rsqrt().to(x.dtype)
    return scaled if weight is None else scaled * weight


class RMSNorm(nn.Module):
    """`rms_norm` with a learned weight, which starts at one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (..., C) -> (..., C), in x's precision."""
        return rms_norm(x, self.weight)
