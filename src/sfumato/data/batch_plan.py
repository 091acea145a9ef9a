"""Which images make up batch k: a function of (seed, shapes, batch size, k), without any state to
save or restore.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sfumato import randomness
from sfumato.errors import ConfigError


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchPlan:
    """An endless sequence of samples, epoch after epoch, each in its own order; batches run across
    the ends of epochs.

    Sample g is element g % size of epoch g // size. Batch k holds samples [k B, (k + 1) B),
    whatever the number of workers or processes; nothing is dropped or repeated, and a batch larger
    than the set holds its images several times. Images of one shape come in whole batches, except
    for a few mixed batches at the end of an epoch; with a single shape the order does not depend on
    B.

    Attributes:
        shapes: of each image of the set, an index into the format's shapes, (size,); an image
            with repeats stands for itself several times.
        batch_size: B, the global one.
        begins: the batch at which the first epoch of this set begins; a run that went on with other
            data saw other batches before.
    """

    seed: int
    shapes: NDArray[np.int64]
    batch_size: int
    begins: int = 0

    @property
    def size(self) -> int:
        """The number of images in the set."""
        return len(self.shapes)

    @property
    def hash(self) -> str:
        """A hash that is equal for plans that give the same batches."""
        begins = f"{self.begins} " if self.begins else ""
        return hashlib.sha256(
            f"{self.seed} {self.batch_size} {begins}".encode() + self.shapes.astype("<i8").tobytes()
        ).hexdigest()

    def samples(self, first: int, count: int) -> NDArray[np.int64]:
        """Return the positions in the set of `count` samples from `first` on, shape (count,)."""
        numbers = np.arange(first, first + count) - self.begins * self.batch_size
        epochs, places = numbers // self.size, numbers % self.size
        chosen = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            chosen[inside] = _order(self, int(epoch))[places[inside]]
        return chosen

    def batch(self, step: int, *, rank: int = 0, ranks: int = 1) -> NDArray[np.int64]:
        """Return the positions in the set of one process's slice of batch `step`.

        Its shape is (B / ranks,); the slices are contiguous.

        Raises:
            ConfigError: if the batch does not divide evenly.
        """
        share = share_of(self.batch_size, ranks)
        return self.samples(step * self.batch_size + rank * share, share)


def share_of(batch_size: int, ranks: int) -> int:
    """Return how many images of a batch each of several processes trains on.

    Raises:
        ConfigError: if they do not divide evenly.
    """
    if batch_size % ranks:
        legal = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
        raise ConfigError(
            f"a batch of {batch_size} images cannot be shared evenly by {ranks} processes",
            where="batch_size",
            hint=f"use one of {legal} processes, or another batch_size",
        )
    return batch_size // ranks


@lru_cache(maxsize=4)
def _order(plan: BatchPlan, epoch: int) -> NDArray[np.int64]:
    """Return the positions of an epoch in order.

    First comes what completes the last batch of the epoch before, then batches of one shape, then
    what is left over.
    """
    permuted = randomness.permutation(plan.seed, "plan", index=epoch, size=plan.size)
    groups = [permuted[plan.shapes[permuted] == shape] for shape in np.unique(plan.shapes)]
    head, groups = _head(groups, -(epoch * plan.size) % plan.batch_size, plan.batch_size)
    chunks = [
        chunk
        for group in groups
        for chunk in np.split(group, range(plan.batch_size, len(group), plan.batch_size))
    ]
    full_batches = [chunk for chunk in chunks if len(chunk) == plan.batch_size]
    remainders = [chunk for chunk in chunks if len(chunk) < plan.batch_size]
    rank = np.argsort(permuted)
    full_batches.sort(key=lambda chunk: rank[chunk[0]])
    return np.concatenate([*head, *full_batches, *remainders])


def _head(
    groups: list[NDArray[np.int64]], count: int, batch_size: int
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Take `count` samples off the groups, and return what was taken and what remains.

    Samples that fill no batch are taken first; the rest comes from the largest groups.
    """
    spare = [len(group) % batch_size for group in groups]
    taken = []
    for size in spare:
        taken.append(min(size, count))
        count -= taken[-1]
    for index in np.argsort([-len(group) for group in groups], kind="stable"):
        more = min(len(groups[index]) - taken[index], count)
        taken[index] += more
        count -= more
    return [g[:n] for g, n in zip(groups, taken, strict=True)], [
        g[n:] for g, n in zip(groups, taken, strict=True)
    ]
