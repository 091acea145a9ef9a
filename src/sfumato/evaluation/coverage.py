"""The share of good samples, and the share of the variety of real images that they cover: clipped
density and clipped coverage, which are 1 for real images; and precision and recall, as papers print
them.

Source: Salvy et al. 2025 (arXiv:2507.01761).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.evaluation.distances import DistanceEstimate
from sfumato.evaluation.figures import t_quantile, unit_length

NEIGHBOURS = 5
MANIFOLD_NEIGHBOURS = 3  # of precision and recall
POINTS_AT_ONCE = 1000
GROUPS = 20  # of samples, each left out in turn, for the interval


class Coverage(NamedTuple):
    """The share of samples that look real, and the share of the variety that they cover."""

    good: DistanceEstimate
    variety: DistanceEstimate


class RealImages:
    """Real images around which samples are counted, by features (N, d) that are made unit length.

    Each is the centre of a ball that reaches to its `neighbours`-th nearest neighbour.

    Raises:
        ValueError: for no more images than neighbours.
    """

    def __init__(self, features: Tensor, *, neighbours: int = NEIGHBOURS) -> None:
        if len(features) <= neighbours:
            raise ValueError(f"{len(features)} images, and {neighbours} neighbours of each")
        self.centres, self.neighbours = unit_length(features), neighbours
        distances = _distances(self.centres, self.centres)
        distances.fill_diagonal_(torch.inf)
        self.radii = distances.kthvalue(neighbours, dim=1).values
        self.clipped = self.radii.clamp(max=float(self.radii.median()))
        inside = (distances <= self.clipped[:, None]).double()
        # of real images in the balls of the others, by which that of samples is divided
        self.density = float(_clip(inside.sum(0), neighbours).mean())

    def measure(self, features: Tensor) -> Coverage:
        """Return how samples (M, d) are distributed among the real images, with 95 % intervals.

        That of the share of good samples is over samples; that of the variety over samples, by
        leaving out a twentieth at a time, and over real images.
        """
        distances = _distances(self.centres, unit_length(features))
        good = _clip((distances <= self.clipped[:, None]).double().sum(0), self.neighbours)
        return Coverage(
            _good(good.numpy() / max(self.density, 1e-12)),
            self._variety((distances <= self.radii[:, None]).double()),
        )

    def _variety(self, inside: Tensor) -> DistanceEstimate:
        """Return the share of variety, given which sample (M) lies in which ball (N): (N, M)."""
        samples = inside.shape[1]
        value, slope = self._calibrated(inside.sum(1), samples)
        generator = torch.Generator().manual_seed(0)
        numbers = torch.randperm(samples, generator=generator) % GROUPS
        groups = len(numbers.unique())
        if groups < 2:
            return DistanceEstimate(value, 0.0, 1.0)
        rest = [
            self._calibrated(inside[:, numbers != group].sum(1), int((numbers != group).sum()))[0]
            for group in range(groups)
        ]
        over_samples = (groups - 1) * float(np.var(rest))
        clipped = _clip(inside.sum(1), self.neighbours)
        over_real = float(clipped.var()) / len(clipped) / slope**2
        half = 1.96 * float(np.sqrt(over_samples + over_real))
        return DistanceEstimate(value, max(0.0, value - half), min(1.0, value + half))

    def _calibrated(self, counts: Tensor, samples: int) -> tuple[float, float]:
        """Return the share of variety, given the number of samples in each ball, and a slope.

        It is the share of samples that, were they new real images and the others outside of all
        balls, would fill the balls as much. The slope is that of the filling over the share.
        """
        filled = float(_clip(counts, self.neighbours).mean())
        expected = expected_filling(len(self.centres), samples, self.neighbours)
        value = float(np.interp(filled, expected, np.linspace(0, 1, samples + 1)))
        step = max(1, samples // 20)
        place = min(round(value * samples), samples - step)
        slope = float(expected[place + step] - expected[place]) * samples / step
        return value, max(slope, 1e-6)


class Manifold:
    """A region of feature space: balls around images (N, d) to their third nearest neighbours.

    The share of samples in that of real images is the precision; the share of real images in that
    of samples is the recall.

    Source: Kynkäänniemi et al. 2019 (arXiv:1904.06991), eq. 1.
    """

    def __init__(self, features: Tensor, *, neighbours: int = MANIFOLD_NEIGHBOURS) -> None:
        self.centres = features.double()
        distances = torch.cdist(self.centres, self.centres).fill_diagonal_(torch.inf)
        self.radii = distances.kthvalue(neighbours, dim=1).values

    def contains(self, features: Tensor) -> NDArray[np.bool_]:
        """Return which points (M, d) lie in the region, (M,)."""
        parts = features.double().split(POINTS_AT_ONCE)
        inside = [(torch.cdist(part, self.centres) <= self.radii).any(1) for part in parts]
        result: NDArray[np.bool_] = torch.cat(inside).numpy()
        return result


def expected_filling(real: int, samples: int, neighbours: int = NEIGHBOURS) -> NDArray[np.float64]:
    """Return how full balls are on average with 0, 1, ..., `samples` new real images in all.

    A ball with k of them is min(k / neighbours, 1) full. The share of the distribution in a ball
    that reaches to the `neighbours`-th of the other real images has a beta distribution, whatever
    the distribution of images, so that their number in it is beta-binomial.
    """
    from scipy.stats import betabinom

    counts = np.arange(neighbours)
    numbers = np.arange(samples + 1)[:, None]
    below = betabinom.pmf(counts, numbers, neighbours, real - neighbours)
    below[counts > numbers] = 0
    missing: NDArray[np.float64] = (below * (neighbours - counts)).sum(1) / neighbours
    return 1 - missing


def _good(densities: NDArray[np.float64]) -> DistanceEstimate:
    value, n = float(densities.mean()), len(densities)
    half = t_quantile(n) * float(densities.std(ddof=1)) / n**0.5 if n > 1 else 1.0
    return DistanceEstimate(
        min(1.0, value), min(1.0, max(0.0, value - half)), min(1.0, value + half)
    )


def _clip(counts: Tensor, neighbours: int) -> Tensor:
    return (counts / neighbours).clamp(max=1.0)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the distances of vectors of unit length, (n, m)."""
    return (2 - 2 * a @ b.T).clamp(min=0).sqrt()
