"""The choice of some images out of many."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def choose_evenly(positions: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return at most `most` of some positions (n,), evenly spaced, in their order.

    The first ones would be of a few categories only: folders are listed category by category.
    """
    return positions[
        np.linspace(0, len(positions) - 1, min(most, len(positions))).round().astype(np.int64)
    ]
