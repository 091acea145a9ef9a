"""The best linear denoiser of a set of images: what a filter that knows their mean and covariance
alone can do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.condition import NO_CONDITION, Condition
from sfumato.diffusion.noise_level import Denoised, NoiseLevel
from sfumato.diffusion.parameterizations import Sample

MAX_ELEMENTS = 1 << 25  # of the images that a covariance is estimated from


@dataclass(frozen=True, kw_only=True)
class LinearDenoiser:
    """E[x0 | x] where x0 is normal, N(mean, V diag(values) V^T + rest (I - V V^T)).

    A network that only equals it has learned the mean, the colours and the smoothness of the
    images, and nothing of their shapes.

    Attributes:
        mean: (D,).
        vectors: V, orthonormal columns, (D, k); k = 0 knows the mean and one variance alone.
        values: variances along the columns, (k,).
        rest: variance along every other direction.
    Source: the Wiener filter; Karras et al. 2022 (arXiv:2206.00364), appendix B.3, has its
        counterpart for a finite set, `EmpiricalDenoiser`.
    """

    mean: Tensor
    vectors: Tensor
    values: Tensor
    rest: float

    @classmethod
    def of(cls, images: Tensor) -> LinearDenoiser:
        """Estimate mean and covariance from images (n, ...), n >= 2.

        The covariance is shrunk towards a multiple of the identity, without which few images
        would leave most directions without any variance.

        Source: Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional
            covariance matrices", eq. 14.
        """
        rows, mean, size = _centred(images)
        count = len(rows)
        gram = rows @ rows.T if count < size else rows.T @ rows
        values, vectors = torch.linalg.eigh(gram / count)
        values = values.clamp(min=0)
        kept = values > values.max() * 1e-10
        values, vectors = values[kept], vectors[:, kept]
        if count < size:
            vectors = rows.T @ vectors / (count * values).sqrt()
        average = float(values.sum()) / size
        spread = float(values.square().sum()) / size - average**2
        error = float(rows.square().sum(1).square().sum()) / count - float(values.square().sum())
        shrinkage = min(1.0, error / size / count / spread) if spread > 0 else 1.0
        return cls(
            mean=mean,
            vectors=vectors,
            values=(1 - shrinkage) * values + shrinkage * average,
            rest=shrinkage * average,
        )

    @classmethod
    def of_mean(cls, images: Tensor) -> LinearDenoiser:
        """Estimate the mean image and one variance around it from images (n, ...)."""
        rows, mean, size = _centred(images)
        none = rows.new_zeros(size, 0)
        return cls(mean=mean, vectors=none, values=none[0], rest=float(rows.square().mean()))

    def __call__(
        self, x: Tensor, level: NoiseLevel, condition: Condition = NO_CONDITION
    ) -> Denoised:
        """Return the posterior mean of x0, and eps to match, for x (B, ...) at sigma > 0."""
        flat = x.flatten(1).to(self.mean)
        shaped = level.like(flat)

        def gain(variance: Tensor | float) -> Tensor:
            result: Tensor = (
                shaped.alpha * variance / (shaped.alpha**2 * variance + shaped.sigma**2)
            )
            return result

        offset = flat - shaped.alpha * self.mean
        along = offset @ self.vectors
        rest = gain(self.rest)
        x0 = self.mean + rest * offset + ((gain(self.values) - rest) * along) @ self.vectors.T
        return Sample().solve(x0.to(x).view_as(x), x, level)


def _centred(images: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return images as rows around their mean, the mean, and the number of their elements.

    Only as many are taken as fit into `MAX_ELEMENTS`.
    """
    size = images[0].numel()
    rows = images[: max(2, MAX_ELEMENTS // size)].flatten(1).double()
    mean = rows.mean(0)
    return rows - mean, mean, size
