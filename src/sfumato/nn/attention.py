"""Multi-head attention over image positions, and from them to context tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.nn.init import zero_init
from sfumato.nn.norms import num_groups


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Split channels into heads: (B, L, C) -> (B, heads, L, C / heads)."""
    result: Tensor = x.unflatten(2, (heads, -1)).transpose(1, 2)
    return result


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v of each head.

    q (B, heads, L, D), k and v (B, heads, S, D) -> (B, heads, L, D). PyTorch's fused kernel is
    used, except for bfloat16 on a CPU that can hold the scores: its backward pass takes 1.6 to 4
    times as long there as the two products written out (docs/benchmarks.md).

    Args:
        mask: True where attention may look, broadcast to (B, heads, L, S); no row may be False
            throughout.
    """
    scores_fit = q.shape[:-1].numel() * k.shape[-2] <= 2**27
    if q.device.type != "cpu" or q.dtype is not torch.bfloat16 or not scores_fit:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    result: Tensor = scores.softmax(-1) @ v
    return result


class SelfAttention(nn.Module):
    """Residual self-attention over the positions of a feature map; its output projection starts at
    zero.
    """

    def __init__(self, channels: int, heads: int, group_channels: int = 16) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(num_groups(channels, group_channels), channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Attend from each position to all: (B, C, H, W) -> (B, C, H, W)."""
        positions = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(positions).chunk(3, dim=2))
        attended = attend(q, k, v).transpose(1, 2).flatten(2)
        result: Tensor = x + self.out(attended).transpose(1, 2).unflatten(2, x.shape[2:])
        return result


class CrossAttention(nn.Module):
    """Residual attention from image positions to context tokens; its output projection starts at
    zero.
    """

    def __init__(
        self, channels: int, heads: int, token_size: int, group_channels: int = 16
    ) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(num_groups(channels, group_channels), channels)
        self.token_norm = nn.LayerNorm(token_size)
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(token_size, 2 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor, tokens: Tensor, token_mask: Tensor | None) -> Tensor:
        """Attend from positions to tokens.

        x (B, C, H, W), tokens (B, L, D), token_mask (B, L) or None -> (B, C, H, W).
        """
        q = split_heads(self.q(self.norm(x).flatten(2).transpose(1, 2)), self.heads)
        k, v = (
            split_heads(part, self.heads)
            for part in self.kv(self.token_norm(tokens)).chunk(2, dim=2)
        )
        mask = None if token_mask is None else token_mask[:, None, None, :]
        attended = attend(q, k, v, mask).transpose(1, 2).flatten(2)
        result: Tensor = x + self.out(attended).transpose(1, 2).unflatten(2, x.shape[2:])
        return result
