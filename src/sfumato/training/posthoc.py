"""Averages of the weights that were not kept, out of some that were.

An average over a power-function profile is, nearly, a sum of other such averages taken at other times and with other widths; the shares
are those whose summed profiles come closest to the profile that is wanted.

Source: Karras et al. 2024 (arXiv:2312.02696), appendix C.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Profile(NamedTuple):
    """An average over (0, step] whose weight at t is proportional to t^gamma."""

    step: float
    gamma: float


def shares(kept: Sequence[Profile], wanted: Profile) -> NDArray[np.float64]:
    """The share of each kept average in the wanted one, (n,); they sum to nearly 1.

    Least squares over all t: the solution of A x = b with A the overlaps of kept profiles, and b theirs with the wanted one.
    """
    matrix = np.array([[overlap(a, b) for b in kept] for a in kept])
    target = np.array([overlap(a, wanted) for a in kept])
    return np.linalg.lstsq(matrix, target, rcond=1e-14)[0]


def overlap(a: Profile, b: Profile) -> float:
    """The integral over t of the product of both profiles, each of integral 1 (eqs. 143 to 150)."""
    both = a.gamma + b.gamma + 1
    first, last = min(a.step, b.step), max(a.step, b.step)
    exponent = (b if a.step == first else a).gamma + 1
    return (a.gamma + 1) * (b.gamma + 1) / both * (first / last) ** exponent / first
