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
        self._length = len(column)
        if len(column) and column.min() == column.max():  # nothing has to be counted
            self._column, self.kinds = column[:1], column[:1].astype(np.int64)
            ends = np.arange(-(-len(column) // BLOCK) + 1) * BLOCK
            self._before = np.minimum(ends, len(column))[:, None]
            self.counts: NDArray[np.int64] = self._before[-1].copy()
            return
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
        self.counts = self._before[-1].copy()

    def before(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many elements of each kind come before positions (n,), as (n, k)."""
        blocks = positions // BLOCK
        places = blocks[:, None] * BLOCK + np.arange(BLOCK)
        inside = self._column.take(places, mode="clip")
        inside_before = places < positions[:, None]
        counts = [((inside == kind) & inside_before).sum(1) for kind in self.kinds]
        result: NDArray[np.int64] = self._before[blocks] + np.stack(counts, axis=1)
        return result

    def part(self, begins: NDArray[np.int64], chosen: NDArray[np.int64]) -> PartOfMembers:
        """Return the elements of some of the consecutive spans that begin at `begins`."""
        ends = np.append(begins[1:], self._length)
        return PartOfMembers(self, self.before(begins[chosen]), self.before(ends[chosen]))

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


class PartOfMembers:
    """The elements of some spans of a column, one span after another.

    Attributes:
        counts: how often these have each kind of the column, (k,).
    """

    def __init__(self, members: Members, first: NDArray[np.int64], last: NDArray[np.int64]) -> None:
        """Take how many elements of each kind come before each span, and before its end, (s, k)."""
        self._members, self._first = members, first
        self._ends = np.cumsum(last - first, axis=0)
        self.counts: NDArray[np.int64] = self._ends[-1].copy()

    def positions(self, number: int, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the positions of elements of kind number `number`, by their ranks from 0 on."""
        ends = self._ends[:, number]
        spans = np.searchsorted(ends, ranks, side="right")
        begins = np.concatenate([[0], ends[:-1]])
        return self._members.positions(number, self._first[spans, number] + ranks - begins[spans])
