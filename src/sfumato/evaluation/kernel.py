"""The kernel distance between two sets of features, which is unbiased for small sets."""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.evaluation.frechet import Estimate

DEGREE = 3


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Return the squared maximum mean discrepancy of features (n, d) and (m, d).

    The kernel is (x y / d + 1)^3. The estimate is unbiased, so it may fall below 0.

    Source: Bińkowski et al. 2018 (arXiv:1801.01401), eq. 4 and sec. 4.
    """
    a, b = a.double(), b.double()
    return float(_within(_kernel(a, a)) + _within(_kernel(b, b)) - 2 * _kernel(a, b).mean())


def kernel_distance_interval(
    a: Tensor, b: Tensor, *, resamples: int = 1000, seed: int = 0
) -> Estimate:
    """Return the distance with a bootstrap interval over the first set, the samples.

    The reference is not resampled. A sample drawn twice must not be compared with itself, so pairs
    of equal samples are left out of each resample's mean.
    """
    a, b = a.double(), b.double()
    inner, across, constant = _kernel(a, a), _kernel(a, b).mean(1), _within(_kernel(b, b))
    diagonal = inner.diagonal()
    drawn = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(resamples):
        counts = torch.bincount(
            torch.randint(len(a), (len(a),), generator=drawn), minlength=len(a)
        ).to(inner)
        pairs = len(a) ** 2 - counts.square().sum()
        mean = (counts @ inner @ counts - (counts.square() * diagonal).sum()) / pairs
        found.append(float(mean + constant - 2 * (counts @ across) / len(a)))
    low, high = torch.tensor(found).quantile(torch.tensor([0.025, 0.975])).tolist()
    value = float(_within(inner) + constant - 2 * across.mean())
    return Estimate(value, low, high)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** DEGREE


def _within(kernel: Tensor) -> Tensor:
    """Return the mean of a square kernel matrix over pairs of different samples."""
    count = len(kernel)
    return (kernel.sum() - kernel.trace()) / (count * (count - 1))
