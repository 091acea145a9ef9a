"""What doubling one side of a grid of runs changes, beside what doubling the other does."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from held_out import plain
from numpy.typing import NDArray

from sfumato.evaluation.distances import DistanceEstimate

Floats = NDArray[np.float64]
RESAMPLES = 2000


def design(numbers: Floats, widths: Floats) -> Floats:
    """Return rows (1, x, z, x z) for all pairs; x and z are log2 of n and width from the middle."""
    x, z = (np.log2(values / np.median(values)) for values in (numbers, widths))
    x, z = (part.ravel() for part in np.meshgrid(x, z, indexing="ij"))
    return np.stack([np.ones_like(x), x, z, x * z], axis=1)


def fit(log_errors: Floats, numbers: Floats, widths: Floats) -> Floats:
    """Return a, b, c, d by least squares, given the mean log errors (numbers, widths)."""
    rows = design(numbers, widths)
    result: Floats = np.linalg.lstsq(rows, log_errors.ravel(), rcond=None)[0]
    return result


def slopes(log_errors: Floats, numbers: Floats, widths: Floats) -> Floats:
    """Return the change for each doubling between neighbours of the grid, given the mean log
    errors (numbers, widths): first of the images, over all widths, then of the width.
    """
    sides = ((log_errors.mean(1), numbers), (log_errors.mean(0), widths))
    return np.concatenate([np.diff(logs) / np.diff(np.log2(values)) for logs, values in sides])


def bootstrap(
    errors: Floats,
    statistic: Callable[[Floats], Floats],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Floats:
    """Return a statistic of the mean log errors (rows, columns) in each resample.

    Test images are drawn for all runs together, and the seeds for each row of the grid, whose
    columns share their training images. Of S seeds S - 1 are drawn, so that the spread of a mean
    of so few comes out right (McCarthy & Snowden 1985).

    Args:
        errors: (rows, columns, seeds, images).
    """
    generator = np.random.default_rng(seed)
    seeds, images = errors.shape[2:]
    values = []
    for _ in range(resamples):
        counts = np.bincount(generator.integers(images, size=images), minlength=images)
        logs = np.log(errors @ (counts / images))
        chosen = generator.integers(seeds, size=(len(errors), max(1, seeds - 1)))
        means = np.stack([row[:, picked].mean(1) for row, picked in zip(logs, chosen, strict=True)])
        values.append(statistic(means))
    return np.array(values)


def estimate(value: float, drawn: Floats) -> list[float]:
    """Return a value with the 95 % interval of its resamples."""
    return plain(DistanceEstimate(value, *np.quantile(drawn, [0.025, 0.975]).tolist()))


def summary(errors: Floats, numbers: Floats, widths: Floats) -> dict[str, Any]:
    """What doubling the images and the width changes in the log error, and which changes more."""
    logs = np.log(errors.mean(3)).mean(2)

    def estimates(names: list[str], statistic: Callable[[Floats], Floats]) -> dict[str, Any]:
        found, drawn = statistic(logs), bootstrap(errors, statistic)
        return {name: estimate(float(found[i]), drawn[:, i]) for i, name in enumerate(names)}

    def sizes(rows: Floats) -> Floats:
        _, b, c, _ = fit(rows, numbers, widths)
        return np.array([abs(b) - abs(c)])

    coefficients = ["a", "images, per doubling", "width, per doubling", "interaction"]
    between = [
        f"{name} {low:g} to {high:g}, per doubling"
        for name, values in (("images", numbers), ("width", widths))
        for low, high in pairwise(values)
    ]
    left = logs.ravel() - design(numbers, widths) @ fit(logs, numbers, widths)
    return {
        **estimates(coefficients, lambda rows: fit(rows, numbers, widths)),
        **estimates(["images less width, absolute"], sizes),
        "P(images matter more)": round(float((bootstrap(errors, sizes) > 0).mean()), 4),
        "R2": round(1 - float((left**2).sum() / ((logs - logs.mean()) ** 2).sum()), 4),
        **estimates(between, lambda rows: slopes(rows, numbers, widths)),
    }
