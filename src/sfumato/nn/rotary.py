"""Rotary embedding: queries and keys are rotated according to where their token lies."""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 100.0  # longest wavelength over the shortest, for sides of a few dozen places


def rotary_angles(rows: int, columns: int, size: int, *, like: Tensor) -> Tensor:
    """Return the angles of every place of a grid, (rows * columns, size / 2).

    One half depends on the row, the other on the column, both measured from the grid's middle.

    Source: Su et al. 2021 (arXiv:2104.09864), eq. 15; along two axes: Heo et al. 2024
        (arXiv:2403.13298), sec. 3.2.

    Args:
        size: channels of a head, a multiple of 4.
    """
    frequencies = BASE ** -(torch.arange(size // 4, device=like.device) / (size // 4))
    y, x = (torch.arange(side, device=like.device) - (side - 1) / 2 for side in (rows, columns))
    by_row, by_column = (places[:, None] * frequencies for places in (y, x))
    return torch.cat([by_row.repeat_interleave(columns, dim=0), by_column.repeat(rows, 1)], dim=1)


def apply_rotary(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate channels i and D / 2 + i of x (B, heads, L, D) in their plane, by `angles`.

    The angles are (L, D / 2), or (B, 1, L, D / 2).
    """
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
