"""Which images make up batch k: a function of (seed, shapes, batch size, k), without any state to
save or restore.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sfumato import randomness
from sfumato.data.members import Members, PartOfMembers
from sfumato.errors import ConfigError

NEWEST = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchPlan:
    """An endless sequence of samples, epoch after epoch, each in its own order; batches run across
    the ends of epochs.

    Sample g is element g % size of epoch g // size. Batch k holds samples [k B, (k + 1) B),
    whatever the number of workers or processes; nothing is dropped or repeated, and a batch larger
    than the set holds its images several times. Images of one shape come in whole batches, except
    for a few mixed batches at the end of each window; with a single shape the order does not depend
    on B.

    Attributes:
        shapes: of each image of the set, an index into the format's shapes, (size,); an image
            with repeats stands for itself several times.
        batch_size: B, the global one.
        begins: the batch at which the first epoch of this set begins; a run that went on with other
            data saw other batches before.
        version: of the order. 2 costs the same for any size; 1 is that of runs begun before it.
        shards: where the shards begin that the set consists of, (s,).
        window: of so many shards, chosen at random, the images come in one random order before those
            of the next shards; 0 is all of them at once.
    """

    seed: int
    shapes: NDArray[np.integer]
    batch_size: int
    begins: int = 0
    version: int = NEWEST
    shards: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    window: int = 0

    @property
    def size(self) -> int:
        """The number of images in the set."""
        return len(self.shapes)

    @property
    def is_windowed(self) -> bool:
        """Whether the images of some shards come before those of others."""
        return 0 < self.window < len(self.shards) and self.version > 1

    def upcoming(self, sample: int, windows: int) -> list[NDArray[np.int64]]:
        """Return the numbers of the shards of the window that holds a sample, and of those after it."""
        epoch, place = divmod(sample - self.begins * self.batch_size, self.size)
        found: list[NDArray[np.int64]] = []
        number = int(np.searchsorted(_layout(self, epoch).ends, place, side="right"))
        while len(found) < windows:
            layout = _layout(self, epoch)
            found += layout.windows[number : number + windows - len(found)]
            epoch, number = epoch + 1, 0
        return found

    @cached_property
    def members(self) -> Members:
        """The images of each shape."""
        return Members(self.shapes)

    @cached_property
    def hash(self) -> str:
        """A hash that is equal for plans that give the same batches."""
        begins = f"{self.begins} " if self.begins else ""
        version = f"version {self.version} " if self.version > 1 else ""
        result = hashlib.sha256(f"{version}{self.seed} {self.batch_size} {begins}".encode())
        if self.is_windowed:
            result.update(f"window {self.window} of {self.shards.tolist()}".encode())
        for part in np.array_split(self.shapes, self.size // (1 << 20) + 1):
            result.update(part.astype("<i8").tobytes())
        return result.hexdigest()

    def samples(self, first: int, count: int) -> NDArray[np.int64]:
        """Return the positions in the set of `count` samples from `first` on, shape (count,)."""
        numbers = np.arange(first, first + count) - self.begins * self.batch_size
        epochs, places = numbers // self.size, numbers % self.size
        chosen = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            chosen[inside] = ORDERS[self.version](self, int(epoch), places[inside])
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


class _Layout(NamedTuple):
    """The windows of an epoch: the numbers of the shards of each, and where each ends, (w,)."""

    windows: list[NDArray[np.int64]]
    ends: NDArray[np.int64]


@lru_cache(maxsize=4)
def _layout(plan: BatchPlan, epoch: int) -> _Layout:
    """Divide the shards of an epoch, in a random order, into windows."""
    count = len(plan.shards)
    if not plan.is_windowed:
        return _Layout([np.arange(count)], np.array([plan.size]))
    order = randomness.permutation(plan.seed, "plan of shards", index=epoch, size=count)
    windows = np.split(order, range(plan.window, count, plan.window))
    sizes = np.diff(plan.shards, append=plan.size)
    return _Layout(windows, np.cumsum([int(sizes[shards].sum()) for shards in windows]))


def _shuffled(plan: BatchPlan, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the positions at some places of an epoch, window after window."""
    windows, ends = _layout(plan, epoch)
    numbers = np.searchsorted(ends, places, side="right")
    result = np.empty_like(places)
    for number in np.unique(numbers).tolist():
        inside = numbers == number
        begin = int(ends[number - 1]) if number else 0
        members = plan.members.part(plan.shards, windows[number])
        missing = -(epoch * plan.size + begin) % plan.batch_size
        index = epoch * len(windows) + number
        result[inside] = _mixed(plan, members, index, missing, places[inside] - begin)
    return result


def _mixed(
    plan: BatchPlan, members: PartOfMembers, index: int, missing: int, places: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the positions at some places of a window.

    First comes what the last batch of the window before lacks, then batches of one shape in a
    random order, then what is left over. The images of a shape have a random order of their own, of
    which these three parts take one after another.
    """
    size, counts = plan.batch_size, members.counts
    several = len(counts) > 1
    head = _head_counts(counts, missing, size)
    full, left = (counts - head) // size, (counts - head) % size
    in_head = places < head.sum()
    in_left = places >= head.sum() + full.sum() * size
    in_full = ~in_head & ~in_left
    kinds, numbers = np.empty_like(places), np.empty_like(places)
    kinds[in_head], numbers[in_head] = _located(places[in_head], head)
    batches, inside = np.divmod(places[in_full] - head.sum(), size)
    if several:
        batches = randomness.shuffled(
            batches, plan.seed, "plan of batches", index=index, size=int(full.sum())
        )
    kinds[in_full], batches = _located(batches, full)
    numbers[in_full] = head[kinds[in_full]] + batches * size + inside
    kinds[in_left], rest = _located(places[in_left] - head.sum() - full.sum() * size, left)
    numbers[in_left] = (head + full * size)[kinds[in_left]] + rest
    result = np.empty_like(places)
    for kind in np.unique(kinds):
        chosen = kinds == kind
        ranks = randomness.shuffled(
            numbers[chosen],
            plan.seed,
            f"plan of shape {plan.members.kinds[kind]}" if several else "plan",
            index=index,
            size=int(counts[kind]),
        )
        result[chosen] = members.positions(int(kind), ranks)
    return result


def _located(
    places: NDArray[np.int64], counts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return in which of consecutive parts, of these sizes, places are, and where in it."""
    ends = np.cumsum(counts)
    parts = np.searchsorted(ends, places, side="right")
    return parts, places - (ends - counts)[parts]


def _head_counts(counts: NDArray[np.int64], missing: int, batch_size: int) -> NDArray[np.int64]:
    """Return how many images of each shape complete a batch that lacks `missing`.

    Images that fill no batch are taken first; the rest comes from the most frequent shapes.
    """
    taken = np.zeros_like(counts)
    for number, spare in enumerate(counts % batch_size):
        taken[number] = min(spare, missing)
        missing -= int(taken[number])
    for number in np.argsort(-counts, kind="stable"):
        more = min(int(counts[number] - taken[number]), missing)
        taken[number] += more
        missing -= more
    return taken


def _permuted(plan: BatchPlan, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the positions at some places of an epoch, in the order of version 1."""
    return _whole_order(plan, epoch)[places]


@lru_cache(maxsize=4)
def _whole_order(plan: BatchPlan, epoch: int) -> NDArray[np.int64]:
    """Return the positions of an epoch in order."""
    permuted = randomness.permutation(plan.seed, "plan", index=epoch, size=plan.size)
    groups = [permuted[plan.shapes[permuted] == shape] for shape in plan.members.kinds]
    heads = _head_counts(
        plan.members.counts, -(epoch * plan.size) % plan.batch_size, plan.batch_size
    )
    head = [group[:taken] for group, taken in zip(groups, heads, strict=True)]
    chunks = [
        chunk
        for group, taken in zip(groups, heads, strict=True)
        for chunk in np.split(
            group[taken:], range(plan.batch_size, len(group) - taken, plan.batch_size)
        )
    ]
    full_batches = [chunk for chunk in chunks if len(chunk) == plan.batch_size]
    remainders = [chunk for chunk in chunks if len(chunk) < plan.batch_size]
    rank = np.argsort(permuted)
    full_batches.sort(key=lambda chunk: rank[chunk[0]])
    return np.concatenate([*head, *full_batches, *remainders])


ORDERS: dict[int, Callable[[BatchPlan, int, NDArray[np.int64]], NDArray[np.int64]]] = {
    1: _permuted,
    2: _shuffled,
}
