"""Detection of images that are the same or nearly so: one scene encoded, resized, toned or cropped
a little differently.

Candidates are neighbours among the principal components of thumbnails without brightness and
contrast. The two images of each pair are laid over one another, and are near-duplicates only if no
part of them differs by more than a new encoding would cause: images that are alike except for a hat
or the colour of a face stay apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sfumato.data.neighbours import nearest_points
from sfumato.data.parallel import forked_map, ordered_map
from sfumato.data.thumbnail_difference import align, centred, differ_less, power
from sfumato.data.thumbnails import (
    CHUNK,
    SIDE,
    Floats,
    Signatures,
    StoredThumbnails,
    Thumbnails,
    signatures_of,
)

ALGORITHM = 5  # raised when a change regroups images
MIN_SIDE = 16  # pixels along the shorter side, under which a copy cannot be told from a look-alike
NEIGHBOURS, DIMENSIONS, COMPONENTS = 8, 12, 48
BLANK = 2.0  # of 255: deviation of a thumbnail's pixels, below which it shows nothing
# Measured on 20,000 CIFAR-10 images and 4,495 emoji with planted copies (docs/benchmarks.md).
# of signatures, for a closer look, and for one after alignment
MIN_CORRELATION, MIN_CORRELATION_TO_ALIGN = 0.8, 0.87
MAX_DIFFERENCE = 16.0
PAIRS_AT_A_LOOK = 128  # of one thread: they stay in its cache
PAIRS_AT_ONCE = 512  # that are given to one thread
PAIRS_OF_AN_IMAGE = 16  # whose comparison takes about as long as decoding a small image
QUERIES = 1 << 16  # whose neighbours are looked at together
SAMPLE = 20_000  # images whose principal components are taken
SLACK = 0.01  # of the squares of signatures, for rounding to 16 bits


def clusters(
    ids: Sequence[str],
    read: Callable[[NDArray[np.int64]], NDArray[Any]],
    *,
    resolution: int,
) -> NDArray[np.int64]:
    """Return the number of the group of equal or nearly equal images that each belongs to, (N,).

    All images of a group are nearly equal to one of them, so that the frames of a video, each like
    the next, do not all form one group.

    Args:
        read: thumbnails (n, 32, 32, 3) at positions.
        resolution: pixels along the shortest side; below MIN_SIDE, only exact copies are grouped.
    """
    same = firsts_of_equals(ids)
    distinct = np.unique(same)
    small: Thumbnails = (
        StoredThumbnails(read, distinct)
        if resolution >= MIN_SIDE
        else np.empty((0, SIDE, SIDE, 3), np.uint8)
    )
    leaders = np.arange(len(distinct))
    pairs = near_pairs(small)
    if len(pairs):
        leaders = _choose_leaders(small, pairs, [ids[number] for number in distinct])
    groups = np.arange(len(ids))
    groups[distinct] = distinct[leaders]
    return np.unique(groups[same], return_inverse=True)[1].astype(np.int64)


def firsts_of_equals(ids: Sequence[str]) -> NDArray[np.int64]:
    """Return the position of the first of the equal ids of each, (N,)."""
    _, firsts, places = np.unique(
        np.array(list(ids), np.bytes_), return_index=True, return_inverse=True
    )
    return firsts[places.reshape(-1)].astype(np.int64)


def _choose_leaders(
    thumbnails: Thumbnails, pairs: NDArray[np.int64], ids: Sequence[str]
) -> NDArray[np.int64]:
    """Return the leader of each thumbnail: among connected ones, the one with the most copies.

    A copy of a follower is compared with the leader itself, so that chains end where the likeness
    does.
    """
    neighbours: dict[int, set[int]] = {}
    for first, second in pairs.tolist():
        neighbours.setdefault(first, set()).add(second)
        neighbours.setdefault(second, set()).add(first)
    leader = np.arange(len(thumbnails))
    free = set(neighbours)
    for chosen in sorted(neighbours, key=lambda number: (-len(neighbours[number]), ids[number])):
        if chosen not in free:
            continue
        free.discard(chosen)
        visited, frontier = {chosen}, [chosen]
        while frontier:
            candidates = sorted(
                {other for number in frontier for other in neighbours[number] if other in free}
                - visited
            )
            visited.update(candidates)
            direct = [other for other in candidates if other in neighbours[chosen]]
            further = np.array(
                [(chosen, other) for other in candidates if other not in neighbours[chosen]],
                np.int64,
            ).reshape(-1, 2)
            frontier = [
                *direct,
                *further[
                    _alike(thumbnails, further, np.ones(len(further), np.float32)), 1
                ].tolist(),
            ]
            leader[frontier] = chosen
            free.difference_update(frontier)
    return leader


def components(count: int, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number of the connected component of each of `count` nodes, given pairs (P, 2)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array(
        (np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(count, count)
    )
    result: NDArray[np.int64] = connected_components(graph, directed=False)[1].astype(np.int64)
    return result


def near_pairs(thumbnails: Thumbnails) -> NDArray[np.int64]:
    """Return pairs (P, 2) of near-duplicates among thumbnails (N, 32, 32, 3).

    They connect the images of each group. Time grows as N log N.
    """
    pairs = np.empty((0, 2), np.int64)
    if len(thumbnails) < 2:
        return pairs
    candidates = queries = np.arange(len(thumbnails))
    values = _SignaturesOnAccess(thumbnails)
    while len(queries):
        points = _points(thumbnails, candidates)
        near = candidates[_neighbours(points, np.searchsorted(candidates, queries))]
        parts = np.array_split(near, len(near) // PAIRS_AT_ONCE + 1)
        new_pairs = forked_map(
            lambda part: part[near_duplicates(thumbnails, values, part)],
            parts,
            images=PAIRS_AT_ONCE // PAIRS_OF_AN_IMAGE,
        )
        pairs = np.concatenate([pairs, *new_pairs])
        candidates, queries = _crowded(components(len(thumbnails), pairs), candidates)
    return pairs


def _crowded(
    groups: NDArray[np.int64], candidates: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return one of the candidates for each group, and those of groups that are searched again.

    These groups are so large that their own members may have hidden other copies.
    """
    _, firsts, sizes = np.unique(groups[candidates], return_index=True, return_counts=True)
    return np.sort(candidates[firsts]), candidates[firsts[sizes > NEIGHBOURS // 2]]


class _Points(NamedTuple):
    """Signatures in fewer dimensions.

    Attributes:
        places: along the first principal components, (n, DIMENSIONS), by which neighbours are found.
        components: along more of them, (n, COMPONENTS), by which neighbours are ruled out.
        squares: of the lengths of the signatures, (n,).
        flat: which say nothing, (n,).
    """

    places: Floats
    components: NDArray[np.float16]
    squares: Floats
    flat: NDArray[np.bool_]


def _points(thumbnails: Thumbnails, chosen: NDArray[np.int64]) -> _Points:
    """Return the points of some thumbnails; no more than a chunk of signatures is held beside them."""
    sample = signatures_of(thumbnails[chosen[:: max(1, len(chosen) // SAMPLE)]])
    centre = sample.mean(0)
    axes = np.linalg.eigh((sample - centre).T @ (sample - centre))[1].astype(np.float32)
    result = _Points(
        np.empty((len(chosen), DIMENSIONS), np.float32),
        np.empty((len(chosen), COMPONENTS), np.float16),
        np.empty(len(chosen), np.float32),
        np.empty(len(chosen), bool),
    )

    def fill(begin: int) -> None:
        span = slice(begin, begin + CHUNK)
        values = signatures_of(thumbnails[chosen[span]])
        result.places[span] = (values - centre) @ axes[:, -DIMENSIONS:]
        result.components[span] = (values - centre) @ axes[:, -COMPONENTS:]
        result.squares[span], result.flat[span] = np.square(values).sum(1), _are_flat(values)

    for _ in ordered_map(fill, range(0, len(chosen), CHUNK)):
        pass
    return result


def _are_flat(values: Floats) -> NDArray[np.bool_]:
    return np.asarray(np.abs(values).max(1) < 1, bool)


def _neighbours(points: _Points, queries: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pair the images at `queries` with those of their nearest neighbours that may be alike.

    Pairs are (P, 2) with first < second.
    """
    size = len(points.places)
    count = min(NEIGHBOURS + 1, size)
    nearest = nearest_points(points.places, queries, count)
    codes = []
    for begin in range(0, len(queries), QUERIES):
        span = slice(begin, begin + QUERIES)
        pairs = np.stack([np.repeat(queries[span], count), nearest[span].reshape(-1)], axis=1)
        pairs = np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1)
        pairs = pairs[_may_be_alike(points, pairs)]
        codes.append(pairs[:, 0] * size + pairs[:, 1])
    return np.stack(np.divmod(np.unique(np.concatenate(codes)), size), axis=1)


def _may_be_alike(points: _Points, pairs: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which pairs may correlate by more than MIN_CORRELATION, as their distance in
    COMPONENTS dimensions says, which is at most that in all; flat ones may in any case.
    """
    first, second = pairs[:, 0], pairs[:, 1]
    difference = points.components[first].astype(np.float32) - points.components[second]
    apart = np.square(difference).sum(1)
    a, b = points.squares[first], points.squares[second]
    most = a + b - 2 * MIN_CORRELATION * np.sqrt(a * b)
    flat = points.flat[first] & points.flat[second]
    return np.asarray((apart <= most + SLACK * (a + b)) | flat, bool)


class _SignaturesOnAccess:
    """Signatures of thumbnails, (N, 192), none of which is held."""

    def __init__(self, thumbnails: Thumbnails) -> None:
        self._thumbnails = thumbnails

    def __getitem__(self, places: Any, /) -> Floats:
        return signatures_of(self._thumbnails[places])


def _correlation(
    thumbnails: Thumbnails, signatures: Signatures, pairs: NDArray[np.int64]
) -> Floats:
    """Return the correlation of the signatures of each pair, of pixels where these are flat."""
    first, second = signatures[pairs[:, 0]], signatures[pairs[:, 1]]
    correlation: Floats = (first * second).sum(1) / (
        np.sqrt(np.square(first).sum(1) * np.square(second).sum(1)) + 1e-6
    )
    flat = np.flatnonzero(_are_flat(first) & _are_flat(second))
    correlation[flat] = _fine_correlation(*(thumbnails[pairs[flat, column]] for column in (0, 1)))
    return correlation


def _fine_correlation(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> Floats:
    """Return the correlation of the pixels of pairs of thumbnails (n, 32, 32, 3).

    It is for images that coarse means do not tell apart, such as fields of many small things; 1
    where both are blank.
    """
    a, b = centred(first), centred(second)
    powers = power(a)[:, 0, 0, 0], power(b)[:, 0, 0, 0]
    correlation: Floats = (a * b).mean((1, 2, 3)) / np.sqrt(powers[0] * powers[1] + 1e-6)
    correlation[np.maximum(*powers) < BLANK**2] = 1
    return correlation


def near_duplicates(
    thumbnails: Thumbnails, signatures: Signatures, pairs: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return whether the two images of each pair (P, 2) are near-duplicates, (P,).

    Args:
        thumbnails: (N, 32, 32, 3), with their `signatures`, (N, 192).
    """
    alike = np.zeros(len(pairs), bool)
    for begin in range(0, len(pairs), PAIRS_AT_ONCE):
        part = pairs[begin : begin + PAIRS_AT_ONCE]
        correlation = _correlation(thumbnails, signatures, part)
        chosen = np.flatnonzero(correlation > MIN_CORRELATION)
        alike[begin + chosen] = _alike(thumbnails, part[chosen], correlation[chosen])
    return alike


def _alike(
    thumbnails: Thumbnails, pairs: NDArray[np.int64], correlation: Floats
) -> NDArray[np.bool_]:
    """Return whether the thumbnails of each pair show the same, as they are or after alignment."""
    alike = np.zeros(len(pairs), bool)
    for begin in range(0, len(pairs), PAIRS_AT_A_LOOK):
        span = slice(begin, begin + PAIRS_AT_A_LOOK)
        first, second = (thumbnails[pairs[span, column]] for column in (0, 1))
        alike[span] = _show_the_same(first, second, correlation[span])
    return alike


def _show_the_same(
    first: NDArray[np.uint8], second: NDArray[np.uint8], correlation: Floats
) -> NDArray[np.bool_]:
    alike = differ_less(first, second, MAX_DIFFERENCE)
    for fixed, moving in ((first, second), (second, first)):
        undecided = np.flatnonzero(~alike & (correlation > MIN_CORRELATION_TO_ALIGN))
        if len(undecided):
            aligned = align(fixed[undecided], moving[undecided])
            alike[undecided] = differ_less(fixed[undecided], aligned, MAX_DIFFERENCE)
    return alike
