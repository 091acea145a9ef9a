"""Which pictures make up batch k: a function of (seed, size, k), with no state to save or restore."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sfumato import randomness


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    return randomness.permutation(seed, "plan", index=epoch, size=size)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An endless sequence of samples: epoch after epoch, each in an order of its own; batches run across epochs' ends.

    Sample g is element g % size of epoch g // size. Batch k holds samples [k B, (k + 1) B), whatever the number of workers or
    processes; nothing is dropped, and a set smaller than the batch is seen several times in it.
    """

    seed: int
    size: int
    batch_size: int

    def samples(self, first: int, count: int) -> NDArray[np.int64]:
        """Positions in the set of samples `first` to `first + count`, shape (count,)."""
        numbers = np.arange(first, first + count)
        epochs, places = numbers // self.size, numbers % self.size
        chosen = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            chosen[inside] = _order(self.seed, int(epoch), self.size)[places[inside]]
        return chosen

    def batch(self, step: int) -> NDArray[np.int64]:
        """Positions in the set of batch `step`, shape (B,)."""
        return self.samples(step * self.batch_size, self.batch_size)
