"""Distances between two sets of features: the Fréchet distance (FID with Inception features) and the
kernel distance (KID with Inception features), which is unbiased for small sets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.evaluation.figures import Figure

# images on either side, below which the Fréchet distance mostly measures their number
FEWEST = 30
DEGREE = 3  # of the polynomial kernel
RESAMPLES = 300
# images on either side, for each dimension of features, below which a Fréchet distance is not given
FRECHET_IMAGES_PER_DIMENSION = 10


class DistanceEstimate(NamedTuple):
    """A distance with its 95 % interval."""

    value: float
    low: float
    high: float

    def figure(self, *, n: int, metric: str, extractor: str, reference: str) -> Figure:
        """Return the distance with what it rests on; see `Figure`."""
        return Figure(
            **self._asdict(), n=n, metric=metric, extractor=extractor, reference=reference
        )


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the Fréchet distance (FID) between features (n, d) and (m, d).

    It is |mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)). It is biased upward for small n:
    compare only figures with the same n, extractor and reference.

    Source: Heusel et al. 2017 (arXiv:1706.08500), eq. 6.
    """
    return _frechet_distance_to(Moments.of(b))(a)


class Moments(NamedTuple):
    """Mean (d,) and covariance (d, d) of features, in float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Return the moments of features (n, d)."""
        features = features.double()
        return cls(features.mean(0), torch.cov(features.T).reshape(features.shape[1], -1))


def frechet_interval(
    a: Tensor, b: Tensor, *, resamples: int = 20, seed: int = 0
) -> DistanceEstimate:
    """Do as `frechet_interval_to`, with the moments of features (m, d)."""
    return frechet_interval_to(a, Moments.of(b), resamples=resamples, seed=seed)


def frechet_interval_to(
    a: Tensor, reference: Moments, *, resamples: int = 20, seed: int = 0
) -> DistanceEstimate:
    """Return the Fréchet distance (FID) of samples (n, d) with a bootstrap interval over them.

    The reference is not resampled. A resample has fewer different images, which alone makes the
    distance larger; so the spread of the resamples is put around the distance itself.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = [torch.randint(len(a), (len(a),), generator=generator) for _ in range(resamples)]
    distance = _frechet_distance_to(reference)
    spread, value = float(torch.tensor([distance(a[rows]) for rows in chosen]).std()), distance(a)
    return DistanceEstimate(value, value - 1.96 * spread, value + 1.96 * spread)


def _frechet_distance_to(reference: Moments) -> Callable[[Tensor], float]:
    """Return the Fréchet distance as a function of the first set; what depends on the reference
    alone is computed once.
    """
    mean, covariance = reference
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def distance(a: Tensor) -> float:
        other_mean, other = Moments.of(a)
        # Tr (S_a S_b)^(1/2) = Tr (S_b^(1/2) S_a S_b^(1/2))^(1/2), whose argument is symmetric and
        # positive.
        cross = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
        value = (other_mean - mean).square().sum() + other.trace() + covariance.trace() - 2 * cross
        return max(0.0, float(value))

    return distance


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Return the kernel distance (KID) between features (n, d) and (m, d).

    It is the squared maximum mean discrepancy with the kernel (x y / d + 1)^3. The estimate is
    unbiased, so it may fall below 0.

    Source: Bińkowski et al. 2018 (arXiv:1801.01401), eq. 4 and sec. 4.
    """
    a, b = a.double(), b.double()
    return float(
        _mean_off_diagonal(_kernel(a, a))
        + _mean_off_diagonal(_kernel(b, b))
        - 2 * _kernel(a, b).mean()
    )


class KernelReference:
    """Images that sets of samples are compared with by the kernel distance.

    Args:
        features: (m, d), m at least 2.
    """

    def __init__(self, features: Tensor, *, resamples: int = RESAMPLES, seed: int = 0) -> None:
        self.features = features.double()
        self.counts = _resample(len(features), resamples, seed=seed + 1)
        inner = _kernel(self.features, self.features)
        self.value = float(_mean_off_diagonal(inner))
        self.draws = _resampled_mean(inner, self.counts)


class KernelComparison(NamedTuple):
    """Kernel distances to several references, and their resamples, (references, R)."""

    estimates: list[DistanceEstimate]
    draws: Tensor

    def difference(self, first: int, second: int) -> DistanceEstimate:
        """Return the distance to one reference minus that to another, for the same samples."""
        low, high = _quantiles(self.draws[first] - self.draws[second])
        value = self.estimates[first].value - self.estimates[second].value
        return DistanceEstimate(value, low, high)


def compare_kernels(
    features: Tensor, references: Sequence[KernelReference], *, seed: int = 0
) -> KernelComparison:
    """Return kernel distances (KID) of samples (n, d) to references, with bootstrap intervals.

    Samples and references are resampled, since either may be few. An image that is drawn twice
    must not be compared with itself, so pairs of equal ones are left out of each resample's mean.
    """
    samples = features.double()
    inner = _kernel(samples, samples)
    counts = _resample(len(samples), len(references[0].counts), seed=seed)
    own, own_draws = float(_mean_off_diagonal(inner)), _resampled_mean(inner, counts)
    estimates, all_draws = [], []
    for reference in references:
        across = _kernel(samples, reference.features)
        crossed = ((counts @ across) * reference.counts).sum(1) / across.numel()
        draws = own_draws + reference.draws - 2 * crossed
        value = own + reference.value - 2 * float(across.mean())
        estimates.append(DistanceEstimate(value, *_quantiles(draws)))
        all_draws.append(draws)
    return KernelComparison(estimates, torch.stack(all_draws))


def paired_difference(first: KernelComparison, second: KernelComparison) -> DistanceEstimate:
    """Return the distance of one set of samples to the first reference minus that of another set.

    Sample i of both sets has the same noise and condition. Both were compared with the same
    reference and seed, so each resample holds the same numbers and real images in both, and the
    interval is that of the paired bootstrap.
    """
    value = first.estimates[0].value - second.estimates[0].value
    return DistanceEstimate(value, *_quantiles(first.draws[0] - second.draws[0]))


def _resample(count: int, resamples: int, *, seed: int) -> Tensor:
    """Return how often each of `count` images is drawn in each resample, (R, count).

    Each resample has at least two different images.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (resamples, count), generator=generator)
    alike = (drawn == drawn[:, :1]).all(1)
    drawn[alike, 0] = (drawn[alike, 0] + 1) % count
    return torch.zeros(resamples, count, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(resamples, count, dtype=torch.float64)
    )


def _resampled_mean(kernel: Tensor, counts: Tensor) -> Tensor:
    """Return the mean of a kernel matrix over pairs of different images, in each resample, (R,)."""
    total = ((counts @ kernel) * counts).sum(1) - counts.square() @ kernel.diagonal()
    result: Tensor = total / (counts.sum(1).square() - counts.square().sum(1))
    return result


def _quantiles(values: Tensor) -> tuple[float, float]:
    low, high = values.quantile(values.new_tensor([0.025, 0.975])).tolist()
    return low, high


def kernel_distance_interval(
    a: Tensor, b: Tensor, *, resamples: int = 1000, seed: int = 0
) -> DistanceEstimate:
    """Return the kernel distance (KID) with a bootstrap interval over the first set, the samples.

    The reference is not resampled. A sample drawn twice must not be compared with itself, so pairs
    of equal samples are left out of each resample's mean.
    """
    a, b = a.double(), b.double()
    inner, across, constant = (
        _kernel(a, a),
        _kernel(a, b).mean(1),
        _mean_off_diagonal(_kernel(b, b)),
    )
    diagonal = inner.diagonal()
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(resamples):
        counts = torch.bincount(
            torch.randint(len(a), (len(a),), generator=generator), minlength=len(a)
        ).to(inner)
        pairs = len(a) ** 2 - counts.square().sum()
        mean = (counts @ inner @ counts - (counts.square() * diagonal).sum()) / pairs
        values.append(float(mean + constant - 2 * (counts @ across) / len(a)))
    low, high = torch.tensor(values).quantile(torch.tensor([0.025, 0.975])).tolist()
    value = float(_mean_off_diagonal(inner) + constant - 2 * across.mean())
    return DistanceEstimate(value, low, high)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** DEGREE


def _mean_off_diagonal(kernel: Tensor) -> Tensor:
    """Return the mean of a square kernel matrix over pairs of different samples."""
    count = len(kernel)
    return (kernel.sum() - kernel.trace()) / (count * (count - 1))
