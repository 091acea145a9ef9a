"""Where each kind of element is in a column, without a list of their positions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK = 1024  # elements that are searched through for one of them
CHUNK = 1024 * BLOCK  # elements that are counted at once


class Members:
    """The positions of the elements of each kind in a column of kinds, by their rank within it.

    Only the counts before each block of the column are held: 8 bytes for each kind and 1,024 elements.

    Attributes:
        kinds: the values that the column has, sorted, (k,).
        counts: how often it has each of them, (k,).
    """

    def __init__(self, column: NDArray[np.integer]) -> None:
        """Count the elements of a column of small numbers from 0 on, (n,)."""
        small = np.min_scalar_type(int(column.max(initial=0)))
        self._column = column if column.itemsize <= small.itemsize else column.astype(small)
        most, blocks = int(column.max(initial=0)) + 1, -(-len(column) // BLOCK)
        inside = np.zeros((blocks + 1, most), np.int64)
        for begin in range(0, len(column), CHUNK):
            part = column[begin : begin + CHUNK].astype(np.int64)
            found = np.bincount(np.arange(len(part)) // BLOCK * most + part)
            first, count = begin // BLOCK + 1, -(-len(part) // BLOCK)
            inside[first : first + count].reshape(-1)[: len(found)] = found
        present = np.flatnonzero(inside.any(0))
        self.kinds = present
        self._before = np.cumsum(inside[:, present], axis=0)
        self.counts: NDArray[np.int64] = self._before[-1].copy()

    def positions(self, number: int, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions of elements of kind `kinds[number]`, by their ranks from 0 on."""
        if len(self.kinds) == 1:
            return ranks
        before = self._before[:, number]
        blocks = np.searchsorted(before, ranks, side="right") - 1
        places = blocks[:, None] * BLOCK + np.arange(BLOCK)
        same = self._column.take(places, mode="clip") == self.kinds[number]
        found = np.cumsum(same, axis=1, dtype=np.int16)
        inside = (found <= (ranks - before[blocks])[:, None]).sum(1)
        result: NDArray[np.int64] = blocks * BLOCK + inside
        return result
