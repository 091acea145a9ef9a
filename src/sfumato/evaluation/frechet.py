"""The Fréchet distance between two sets of features."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# images on either side, below which the distance says more about their number than about the images
FEWEST = 30


class Estimate(NamedTuple):
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return |mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of features (n, d) and (m, d).

    It is biased upward for small n: compare only figures with the same n, extractor and reference.

    Source: Heusel et al. 2017 (arXiv:1706.08500), eq. 6.
    """
    return _distance_to(b)(a)


def frechet_interval(a: Tensor, b: Tensor, *, resamples: int = 20, seed: int = 0) -> Estimate:
    """Return the distance with a bootstrap interval over the first set, the samples.

    The reference is not resampled. A resample has fewer different images, which alone makes the
    distance larger; so the spread of the resamples is put around the distance itself.
    """
    drawn = torch.Generator().manual_seed(seed)
    chosen = [torch.randint(len(a), (len(a),), generator=drawn) for _ in range(resamples)]
    distance = _distance_to(b)
    spread, found = float(torch.tensor([distance(a[rows]) for rows in chosen]).std()), distance(a)
    return Estimate(found, found - 1.96 * spread, found + 1.96 * spread)


def _distance_to(b: Tensor) -> Callable[[Tensor], float]:
    """Return the distance as a function of the first set; the rest is computed once."""
    mean, covariance = _moments(b)
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def distance(a: Tensor) -> float:
        other_mean, other = _moments(a)
        # Tr (S_a S_b)^(1/2) = Tr (S_b^(1/2) S_a S_b^(1/2))^(1/2), whose argument is symmetric and
        # positive.
        cross = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
        found = (other_mean - mean).square().sum() + other.trace() + covariance.trace() - 2 * cross
        return max(0.0, float(found))

    return distance


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (d,) and the covariance (d, d), in float64."""
    features = features.double()
    return features.mean(0), torch.cov(features.T).reshape(features.shape[1], -1)
