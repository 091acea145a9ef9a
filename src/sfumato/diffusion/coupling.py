"""The pairing of noise with images: the only axis that flow matching adds to diffusion."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.config import Extensible


class Coupling(Extensible, ABC):
    """Reorder a batch of noise, given the batch of data; each row stays a standard normal draw.

    A dataclass derived from this class is a kind of coupling.
    """

    @abstractmethod
    def __call__(self, x0: Tensor, noise: Tensor) -> Tensor:
        """Return the noise (B, ...) in another order."""


@dataclass(frozen=True)
class Independent(Coupling):
    """Noise drawn without looking at the data."""

    def __call__(self, x0: Tensor, noise: Tensor) -> Tensor:
        """Return the noise in the order in which it was drawn."""
        return noise


@dataclass(frozen=True)
class MinibatchOptimalTransport(Coupling):
    """The assignment within the batch with the least total squared distance, for straighter paths
    (Pooladian et al. 2023, arXiv:2304.14772).
    """

    def __call__(self, x0: Tensor, noise: Tensor) -> Tensor:
        """Return the noise in the order with the least total squared distance to `x0`."""
        from scipy.optimize import linear_sum_assignment

        cost = torch.cdist(x0.flatten(1).double(), noise.flatten(1).double()) ** 2
        _, order = linear_sum_assignment(cost.cpu().numpy())
        return noise[torch.from_numpy(order).to(noise.device)]
