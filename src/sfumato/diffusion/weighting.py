"""How much each noise level counts in the loss.

A weighting is stated in noise-prediction space, L = E w(lambda) |eps^ - eps|^2, whatever the
network predicts, and returned here as alpha^2 w(lambda): with |eps^ - eps|^2 = (alpha/D)^2 |T^ -
T|^2 the weight on the target's error is alpha^2 w / D^2, finite at both ends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sfumato.config import Extensible
from sfumato.config.bounds import Finite, Positive
from sfumato.diffusion.noise_level import NoiseLevel
from sfumato.diffusion.parameterizations import Flow, Parameterization, ParameterizationConfig


class Weighting(Extensible, ABC):
    """A weighting, as alpha^2 w(lambda) of the level.

    A dataclass derived from this class is a kind of weighting.
    """

    @abstractmethod
    def __call__(self, level: NoiseLevel, parameterization: Parameterization) -> Tensor:
        """Return alpha^2 w(lambda), of the level's shape."""


@dataclass(frozen=True)
class Native(Weighting):
    """1 in the parameterization's own space: w = (D/alpha)^2, the plain mean squared error of the
    target.
    """

    def __call__(self, level: NoiseLevel, parameterization: Parameterization) -> Tensor:
        """Return D^2, D the determinant of the network's own parameterization."""
        return parameterization.determinant(level) ** 2


@dataclass(frozen=True)
class UniformEpsilon(Weighting):
    """w = 1: DDPM's simple loss (Ho et al. 2020, arXiv:2006.11239, eq. 14)."""

    def __call__(self, level: NoiseLevel, parameterization: Parameterization) -> Tensor:
        """Return alpha^2."""
        return level.alpha**2


@dataclass(frozen=True)
class MinSNR(Weighting):
    """w = min(1, gamma e^-lambda) (Hang et al. 2023, arXiv:2303.09556).

    Attributes:
        gamma: in x0 space, the SNR above which the weight no longer grows; in eps space, the weight
            falls above it.
    """

    gamma: Positive = 5.0

    def __call__(self, level: NoiseLevel, parameterization: Parameterization) -> Tensor:
        """Return min(alpha^2, gamma sigma^2)."""
        return torch.minimum(level.alpha**2, self.gamma * level.sigma**2)


@dataclass(frozen=True)
class SigmoidWeighting(Weighting):
    """w = sigmoid(bias - lambda) (Kingma & Gao 2023, arXiv:2303.00848; Hoogeboom et al. 2024,
    arXiv:2410.19324).

    Attributes:
        bias: log-SNR at which the weight is one half.
    """

    kind: ClassVar[str] = "sigmoid"

    bias: Finite = 0.0

    def __call__(self, level: NoiseLevel, parameterization: Parameterization) -> Tensor:
        """Return alpha^2 sigmoid(bias - lambda)."""
        return level.alpha**2 * torch.sigmoid(self.bias - level.logsnr())


@dataclass(frozen=True)
class EDM(Weighting):
    """w = 1 + e^-lambda / sigma_data^2 (Karras et al. 2022, arXiv:2206.00364, table 1).

    Attributes:
        sigma_data: standard deviation of the data.
    """

    sigma_data: Positive = 0.5

    def __call__(self, level: NoiseLevel, parameterization: Parameterization) -> Tensor:
        """Return alpha^2 + (sigma / sigma_data)^2."""
        return level.alpha**2 + (level.sigma / self.sigma_data) ** 2


@dataclass(frozen=True, kw_only=True)
class TargetSpace(Weighting):
    """1 in another parameterization's space: with `TargetSpace(space=Flow())`, a network that
    predicts the image is judged by its velocity.

    Attributes:
        space: whose target's error counts alike at every level.
        max_weight: largest weight of the clean image's squared error, which would grow without
            bound as noise vanishes.

    Source: Salimans & Ho 2022 (arXiv:2202.00512), sec. 4; for large patches: Li & He 2025
        (arXiv:2511.13720), table 1 and sec. 4, which takes 0.05 for the least noise and so 1/0.05^2
        for `max_weight`.
    """

    kind: ClassVar[str] = "target-space"

    space: ParameterizationConfig = Flow()
    max_weight: Positive = 400.0

    def __call__(self, level: NoiseLevel, parameterization: Parameterization) -> Tensor:
        """Return min(D^2, max_weight sigma^2), D the determinant of `space`."""
        return torch.minimum(self.space.determinant(level) ** 2, self.max_weight * level.sigma**2)


def target_weight(
    weighting: Weighting, level: NoiseLevel, parameterization: Parameterization
) -> Tensor:
    """Return the weight on |T^ - T|^2 at `level`, alpha^2 w / D^2, any shape."""
    return weighting(level, parameterization) / parameterization.determinant(level) ** 2
