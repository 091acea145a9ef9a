"""Figures as they are reported: a value with its interval, and what it was computed from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NO_EXTRACTOR = "none"


def wilson(proportion: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion in [0, 1] of n trials (Wilson 1927)."""
    z = 1.959964
    centre = (proportion + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(proportion * (1 - proportion) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def t_quantile(n: int) -> float:
    """Return the 97.5 % quantile of Student's t for the mean of n values; infinite for one."""
    from scipy.stats import t

    return float(t.ppf(0.975, n - 1)) if n > 1 else math.inf


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure.

    Attributes:
        value: what was measured.
        low, high: its 95 % interval; None where too few images were measured to tell.
        n: the number of images measured.
        metric: what the value is, in words.
        extractor: the network in whose features images were compared; "none" for pixels.
        reference: what they were compared with.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    metric: str
    extractor: str = NO_EXTRACTOR
    reference: str

    @classmethod
    def proportion(cls, hits: NDArray[Any], **words: Any) -> Figure | None:
        """Return the proportion of images for which something holds, (n,); None without images."""
        if not len(hits):
            return None
        value = float(np.mean(hits))
        low, high = wilson(value, len(hits))
        return cls(value=value, low=low, high=high, n=len(hits), **words)

    @classmethod
    def mean(cls, values: NDArray[Any], **words: Any) -> Figure | None:
        """Return the mean of values (n,), of those that are finite; None without any."""
        values = values[np.isfinite(values)].astype(np.float64)
        if not len(values):
            return None
        value, n = float(values.mean()), len(values)
        if n == 1:
            return cls(value=value, low=None, high=None, n=n, **words)
        half = t_quantile(n) * float(values.std(ddof=1)) / math.sqrt(n)
        return cls(value=value, low=value - half, high=value + half, n=n, **words)

    def plain(self) -> dict[str, Any]:
        """Return the figure as plain data."""
        return asdict(self)

    def text(self, write: Callable[[float], str]) -> str:
        """Format the value with its interval."""
        if self.low is None or self.high is None:
            return write(self.value)
        return f"{write(self.value)} [{write(self.low)}, {write(self.high)}]"


def percent(value: float) -> str:
    """Format a proportion."""
    return f"{value:.1%}"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its 95 % interval: Student's t, or Wilson's for a proportion.

    Attributes:
        n: how many values were averaged.
    """

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """Average one value for each sample, without NaN.

        Values that are all 0 or 1 are a proportion.
        """
        valid = values[~values.isnan()].double()
        n = len(valid)
        if n and bool(((valid == 0) | (valid == 1)).all()):
            low, high = wilson(float(valid.mean()), n)
            return cls(mean=float(valid.mean()), low=low, high=high, n=n)
        return cls.of_mean(valid)

    @classmethod
    def of_mean(cls, values: Tensor) -> Estimate:
        """Average one value for each sample, without NaN, by Student's t."""
        valid = values[~values.isnan()].double()
        n = len(valid)
        mean = float(valid.mean()) if n else math.nan
        half = t_quantile(n) * float(valid.std()) / math.sqrt(n) if n > 1 else math.inf
        return cls(mean=mean, low=mean - half, high=mean + half, n=n)

    def bounded(self, most: float = math.inf) -> Estimate:
        """Return the estimate of values that lie in [0, most], as the interval then does too."""
        return replace(self, low=max(0.0, self.low), high=min(most, self.high))

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def figure(self, metric: str, reference: str) -> Figure | None:
        """Return the estimate as a figure; None if nothing was averaged."""
        if not self.n:
            return None
        bounded = math.isfinite(self.low)
        return Figure(
            value=self.mean,
            low=self.low if bounded else None,
            high=self.high if bounded else None,
            n=self.n,
            metric=metric,
            reference=reference,
        )


def unit_length(features: Tensor) -> Tensor:
    """Return features (n, d) of unit length, in float64."""
    return torch.nn.functional.normalize(features.double(), dim=1)
