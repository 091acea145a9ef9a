"""The Fréchet distance between two sets of features."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of features (n, d) and (m, d).

    Biased upward for small n: compare only figures with the same n, extractor and reference.
    Source: Heusel et al. 2017 (arXiv:1706.08500), eq. 6.
    """
    a, b = a.double(), b.double()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    left, right = (torch.cov(features.T).reshape(features.shape[1], -1) for features in (a, b))
    root = _square_root(left)
    # Tr (S_a S_b)^(1/2) = Tr (S_a^(1/2) S_b S_a^(1/2))^(1/2), whose argument is symmetric and positive.
    cross = torch.linalg.eigvalsh(root @ right @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float(mean + left.trace() + right.trace() - 2 * cross))


def frechet_interval(a: Tensor, b: Tensor, *, resamples: int = 20, seed: int = 0) -> Estimate:
    """The same with a bootstrap interval over the first set, the samples; the reference stays.

    A resample has fewer different pictures, which alone makes the distance larger: so the resamples' spread is put around the distance
    itself.
    """
    drawn = torch.Generator().manual_seed(seed)
    chosen = [torch.randint(len(a), (len(a),), generator=drawn) for _ in range(resamples)]
    spread = float(torch.tensor([frechet_distance(a[rows], b) for rows in chosen]).std())
    found = frechet_distance(a, b)
    return Estimate(found, found - 1.96 * spread, found + 1.96 * spread)


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
