"""The error of a denoiser on images it has not seen, level by level.

It is measured on fixed triples (image, noise, level), which are the same at every call with the
same seed, so that the figures of a run can be compared. The levels are spread evenly over the
log-SNR range that training covers.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfumato import randomness
from sfumato.condition import Condition
from sfumato.diffusion import Denoiser, NoiseLevel, Schedule, weighted_mean


@dataclass(frozen=True, kw_only=True)
class Triples:
    """Images (n, C, H, W), each with a noise and a level.

    `bin` is the number of the range of log-SNR, between two of `edges`, that the level is in.
    `weights` (n, 1, H, W), if any, say where errors count.
    """

    x0: Tensor
    noise: Tensor
    level: NoiseLevel
    bin: Tensor
    edges: Tensor
    weights: Tensor | None = None

    def second_moment(self) -> float:
        """Return the mean of x0^2, where errors count."""
        return float(self.mean(self.x0.double().square()).mean())

    def mean(self, values: Tensor, part: slice = slice(None)) -> Tensor:
        """Return the mean of each triple's values (m, C, H, W) where errors count, (m,).

        Args:
            part: the triples that the values are of.
        """
        if self.weights is None:
            return values.flatten(1).mean(1)
        return weighted_mean(values, self.weights[part].to(values))


def make_triples(x0: Tensor, schedule: Schedule, *, seed: int, bins: int) -> Triples:
    """Make one triple of each image in `x0`; image i's level lies in bin i modulo `bins`.

    The range is the one that 98 % of the training levels cover. Levels are variance-preserving,
    which makes no difference to a denoiser.
    """
    ends = schedule(torch.tensor([0.01, 0.99], dtype=torch.float64)).logsnr()
    edges = torch.linspace(float(ends[1]), float(ends[0]), bins + 1, dtype=torch.float64)
    number = torch.arange(len(x0)) % bins
    within = randomness.uniform(seed, "validation/level", first=0, count=len(x0))[:, 0]
    logsnr = edges[0] + (number + within) * (edges[1] - edges[0])
    level = NoiseLevel(torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt())
    noise = randomness.normal(seed, "validation/noise", first=0, shape=tuple(x0.shape))
    return Triples(x0=x0, noise=noise.to(x0), level=level, bin=number, edges=edges)


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Squared and absolute errors of the predicted noise and of x0.

    They are averaged over the elements of each triple that count, (n,).
    """

    eps_square: Tensor
    eps_absolute: Tensor
    x0_square: Tensor
    x0_absolute: Tensor


@torch.no_grad()
def measure(
    denoiser: Denoiser, triples: Triples, condition: Condition, *, batch_size: int
) -> Errors:
    """Run the denoiser on all triples, and return its errors."""
    parts: list[list[Tensor]] = [[], [], [], []]
    for first in range(0, len(triples.x0), batch_size):
        part = slice(first, first + batch_size)
        x0, noise, level = triples.x0[part], triples.noise[part], triples.level.at(part)
        denoised = denoiser(level.mix(x0, noise), level, condition.map(operator.itemgetter(part)))
        for offset, error in enumerate((denoised.eps - noise, denoised.x0 - x0)):
            parts[offset].append(triples.mean(error.double().square(), part).cpu())
            parts[offset + 2].append(triples.mean(error.double().abs(), part).cpu())
    eps_square, x0_square, eps_absolute, x0_absolute = (torch.cat(part) for part in parts)
    return Errors(
        eps_square=eps_square,
        eps_absolute=eps_absolute,
        x0_square=x0_square,
        x0_absolute=x0_absolute,
    )


@torch.no_grad()
def predicted_noise(
    denoiser: Denoiser, triples: Triples, condition: Condition, *, batch_size: int
) -> Tensor:
    """Run the denoiser on all triples, and return the predicted noise on the CPU, (n, C, H, W)."""
    predictions = []
    for first in range(0, len(triples.x0), batch_size):
        part = slice(first, first + batch_size)
        level = triples.level.at(part)
        x = level.mix(triples.x0[part], triples.noise[part])
        denoised = denoiser(x, level, condition.map(operator.itemgetter(part)))
        predictions.append(denoised.eps.float().cpu())
    return torch.cat(predictions)


def summarize(errors: Errors, triples: Triples, second_moment: float) -> dict[str, Any]:
    """Return MSE, RMSE and MAE of the noise and of x0, and R^2, overall and in each bin of log-SNR.

    R^2 compares with the best linear guess eps ~ c x, c = sigma/(alpha^2 m + sigma^2), whose mean
    squared error is alpha^2 m/(alpha^2 m + sigma^2) for images of second moment m = E[x0^2].
    (Against the mean of eps, merely copying the input would score near 1 at high noise.) It is the
    same for eps and x0, whose errors are proportional.
    """
    alpha2, sigma2 = triples.level.alpha**2, triples.level.sigma**2
    trivial = alpha2 * second_moment / (alpha2 * second_moment + sigma2)

    def figures(chosen: Tensor) -> dict[str, float]:
        eps, x0 = float(errors.eps_square[chosen].mean()), float(errors.x0_square[chosen].mean())
        return {
            "eps_mse": eps,
            "eps_rmse": math.sqrt(eps),
            "eps_mae": float(errors.eps_absolute[chosen].mean()),
            "x0_mse": x0,
            "x0_rmse": math.sqrt(x0),
            "x0_mae": float(errors.x0_absolute[chosen].mean()),
            "r2": 1 - eps / float(trivial[chosen].mean()),
        }

    rows = []
    for number in range(len(triples.edges) - 1):
        chosen = triples.bin == number
        if chosen.any():
            low, high = float(triples.edges[number]), float(triples.edges[number + 1])
            rows.append(
                {"logsnr_low": low, "logsnr_high": high, "n": int(chosen.sum()), **figures(chosen)}
            )
    return {**figures(torch.ones_like(triples.bin, dtype=torch.bool)), "bins": rows}


def difference(first: Errors, second: Errors, triples: Triples) -> dict[str, Any]:
    """Return the squared noise error of `first` minus that of `second`, overall and by bin.

    Both are measured with the same noises and levels; each figure has its 95 % interval.
    Overfitting (held-out minus seen) shows at intermediate levels first, where an average over all
    levels hides it.
    """
    values = first.eps_square - second.eps_square

    def interval(values: Tensor) -> dict[str, float]:
        half = 1.96 * float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf
        return {
            "mean": float(values.mean()),
            "low": float(values.mean()) - half,
            "high": float(values.mean()) + half,
        }

    numbers = [number for number in range(len(triples.edges) - 1) if (triples.bin == number).any()]
    return {
        **interval(values),
        "bins": [
            {
                "logsnr_low": float(triples.edges[number]),
                "logsnr_high": float(triples.edges[number + 1]),
                **interval(values[triples.bin == number]),
            }
            for number in numbers
        ],
    }
