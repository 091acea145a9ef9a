"""Detection of images that are the same or nearly so: one scene encoded, resized, toned or cropped
a little differently.

Candidates are neighbours among the principal components of thumbnails without brightness and
contrast. The two images of each pair are laid over one another, and are near-duplicates only if no
part of them differs by more than a new encoding would cause: images that are alike except for a hat
or the colour of a face stay apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfumato.data.neighbours import nearest_points
from sfumato.data.parallel import ordered_map

ALGORITHM = 5  # raised when a change regroups images
SIDE = 32
MIN_SIDE = 16  # pixels along the shorter side, under which a copy cannot be told from a look-alike
NEIGHBOURS, DIMENSIONS = 8, 12
FLAT = 6.0  # of 255: below this contrast, noise is not stretched
BLANK = 2.0  # of 255: deviation of a thumbnail's pixels, below which it shows nothing
# Measured on 20,000 CIFAR-10 images and 4,495 emoji with planted copies (docs/benchmarks.md).
# of signatures, for a closer look, and for one after alignment
MIN_CORRELATION, MIN_CORRELATION_TO_ALIGN = 0.8, 0.87
MAX_DIFFERENCE, EDGE_TOLERANCE = 16.0, 0.2
ZOOMS, SHIFTS = (1.0, 1.035, 1.07, 1.105), (-1.0, -0.5, 0.0, 0.5, 1.0)
MARGIN = 2  # pixels of a thumbnail at its rim, which an alignment may have to make up
PLACES = np.arange(MARGIN, SIDE - MARGIN, 2)  # pixels that an alignment is judged by
CHUNK = 4_000
PAIRS_AT_A_LOOK = 128  # of one thread: they stay in its cache
PAIRS_AT_ONCE = 1_000  # each takes about 100 kB while it is compared
# of the range of values: a set that uses less is stretched before its images are compared
DIM = 0.5
PERCENTILES = (0.1, 99.9)
Floats = NDArray[np.float32]


def thumbnail(pixels: NDArray[Any]) -> NDArray[Any]:
    """Scale pixels (C, H, W) of 8 or 16 bits to an RGB thumbnail (32, 32, 3) of the same dtype.

    Near-duplicates are found by these.
    """
    colours = pixels[:3] if pixels.shape[0] >= 3 else np.repeat(pixels[:1], 3, axis=0)
    if colours.dtype != np.uint8:
        planes = [
            Image.fromarray(plane.astype(np.float32)).resize(
                (SIDE, SIDE), Image.Resampling.BILINEAR
            )
            for plane in colours
        ]
        result: NDArray[Any] = np.rint(
            np.stack([np.asarray(plane) for plane in planes], axis=2)
        ).astype(colours.dtype)
        return result
    interleaved = np.ascontiguousarray(colours.transpose(1, 2, 0))
    if interleaved.shape[:2] == (SIDE, SIDE):
        return interleaved
    image = Image.fromarray(interleaved)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def stretch_contrast(
    thumbnails: NDArray[Any], limits: tuple[float, float] | None = None
) -> NDArray[np.uint8]:
    """Convert thumbnails (N, 32, 32, 3) to 8 bits.

    Args:
        limits: the values that become 0 and 255; by default those of `contrast_limits`.
    """
    low, high = limits or contrast_limits(thumbnails)
    if thumbnails.dtype == np.uint8 and (low, high) == (0, 255):
        return thumbnails
    values = np.rint((thumbnails.astype(np.float32) - low) * (255 / (high - low)))
    result: NDArray[np.uint8] = values.clip(0, 255).astype(np.uint8)
    return result


def contrast_limits(thumbnails: NDArray[Any]) -> tuple[float, float]:
    """Return the values that are black and white when the images of a set are compared.

    A set that uses little of its range, as dim microscopy and star fields do, is stretched to all
    of it; otherwise its images would seem flat and therefore alike.
    """
    most = float(np.iinfo(thumbnails.dtype).max)
    sample = thumbnails[:: max(1, len(thumbnails) // 1000)]
    low, high = np.percentile(sample, PERCENTILES) if len(sample) else (0.0, most)
    if high - low >= DIM * most or high <= low:
        return 0.0, most
    return float(low), float(high)


class Thumbnails(Protocol):
    """Thumbnails (N, 32, 32, 3) of 8 bits, in memory or read on access."""

    def __len__(self) -> int: ...
    def __getitem__(self, places: Any, /) -> NDArray[np.uint8]: ...


class StoredThumbnails:
    """Thumbnails that are read on access, with the contrast of the whole set stretched."""

    def __init__(
        self, read: Callable[[NDArray[np.int64]], NDArray[Any]], positions: NDArray[np.int64]
    ) -> None:
        self._read, self._positions = read, positions
        self._limits = contrast_limits(read(positions[:: max(1, len(positions) // 1000)]))

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, places: Any, /) -> NDArray[np.uint8]:
        return stretch_contrast(self._read(self._positions[places]), self._limits)


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
                *(
                    further[
                        _alike(thumbnails, further, np.ones(len(further), np.float32)), 1
                    ].tolist()
                ),
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
    values = signatures(thumbnails)
    candidates = queries = np.arange(len(thumbnails))
    while len(queries):
        near = candidates[_neighbours(values[candidates], np.searchsorted(candidates, queries))]
        new_pairs = ordered_map(
            lambda chosen: chosen[0][_alike(thumbnails, *chosen)],
            list(_candidate_pairs(thumbnails, values, near)),
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


def signatures(thumbnails: Thumbnails) -> Floats:
    """Return 8 x 8 means of thumbnails (N, 32, 32, 3) without brightness and contrast: (N, 192)."""
    result = np.empty((len(thumbnails), 8 * 8 * 3), np.float32)

    def fill(begin: int) -> None:
        values = _means(thumbnails[begin : begin + CHUNK], SIDE // 8)
        values = values.reshape(len(values), -1)
        values -= values.mean(1, keepdims=True)
        values /= np.maximum(values.std(1, keepdims=True), FLAT)
        result[begin : begin + CHUNK] = values

    for _ in ordered_map(fill, range(0, len(thumbnails), CHUNK)):
        pass
    return result


def _means(images: NDArray[Any], size: int) -> Floats:
    """Return the means of size x size cells of images (n, H, W, C)."""
    n, height, width, channels = images.shape
    result: Floats = images.reshape(n, height // size, size, width // size, size, channels).mean(
        (2, 4), dtype=np.float32
    )
    return result


def _neighbours(signatures: Floats, queries: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pair the images at `queries` with their nearest neighbours in a few principal components.

    Pairs are (P, 2) with first < second.
    """
    sample = signatures[:: max(1, len(signatures) // 20_000)]
    centre = sample.mean(0)
    axes = np.linalg.eigh((sample - centre).T @ (sample - centre))[1][:, -DIMENSIONS:]
    points = (signatures - centre) @ axes.astype(np.float32)
    count = min(NEIGHBOURS + 1, len(points))
    nearest = nearest_points(points, queries, count)
    pairs = np.stack([np.repeat(queries, count), nearest.reshape(-1)], axis=1)
    return np.unique(np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1), axis=0)


def _candidate_pairs(
    thumbnails: Thumbnails, signatures: Floats, pairs: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], Floats]]:
    """Yield, in chunks, the pairs worth a closer look and the correlations of their signatures."""
    for part in np.array_split(pairs, len(pairs) // CHUNK + 1):
        correlation = _correlation(thumbnails, signatures, part)
        chosen = np.flatnonzero(correlation > MIN_CORRELATION)
        for few in np.array_split(chosen, len(chosen) // PAIRS_AT_A_LOOK + 1):
            yield part[few], correlation[few]


def _correlation(thumbnails: Thumbnails, signatures: Floats, pairs: NDArray[np.int64]) -> Floats:
    """Return the correlation of the signatures of each pair, of pixels where these are flat."""
    first, second = signatures[pairs[:, 0]], signatures[pairs[:, 1]]
    correlation: Floats = (first * second).sum(1) / (
        np.sqrt(np.square(first).sum(1) * np.square(second).sum(1)) + 1e-6
    )
    flat = np.flatnonzero((np.abs(first).max(1) < 1) & (np.abs(second).max(1) < 1))
    correlation[flat] = _fine_correlation(*(thumbnails[pairs[flat, column]] for column in (0, 1)))
    return correlation


def _fine_correlation(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> Floats:
    """Return the correlation of the pixels of pairs of thumbnails (n, 32, 32, 3).

    It is for images that coarse means do not tell apart, such as fields of many small things; 1
    where both are blank.
    """
    a, b = _centre(first), _centre(second)
    powers = _power(a)[:, 0, 0, 0], _power(b)[:, 0, 0, 0]
    correlation: Floats = (a * b).mean((1, 2, 3)) / np.sqrt(powers[0] * powers[1] + 1e-6)
    correlation[np.maximum(*powers) < BLANK**2] = 1
    return correlation


def near_duplicates(
    thumbnails: Thumbnails, signatures: Floats, pairs: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return whether the two images of each pair (P, 2) are near-duplicates, (P,).

    Args:
        thumbnails: (N, 32, 32, 3), with their `signatures`, (N, 192).
    """
    alike = np.zeros(len(pairs), bool)
    for part in np.array_split(np.arange(len(pairs)), len(pairs) // PAIRS_AT_ONCE + 1):
        correlation = _correlation(thumbnails, signatures, pairs[part])
        chosen = correlation > MIN_CORRELATION
        alike[part[chosen]] = _alike(thumbnails, pairs[part[chosen]], correlation[chosen])
    return alike


def _alike(
    thumbnails: Thumbnails, pairs: NDArray[np.int64], correlation: Floats
) -> NDArray[np.bool_]:
    """Return whether the thumbnails of each pair show the same, as they are or after alignment."""
    alike = np.zeros(len(pairs), bool)
    if len(pairs):
        alike[:] = difference(thumbnails[pairs[:, 0]], thumbnails[pairs[:, 1]]) < MAX_DIFFERENCE
    for columns in ((0, 1), (1, 0)):
        undecided = np.flatnonzero(~alike & (correlation > MIN_CORRELATION_TO_ALIGN))
        if len(undecided):
            fixed, moving = (thumbnails[pairs[undecided, column]] for column in columns)
            alike[undecided] = difference(fixed, _align(fixed, moving)) < MAX_DIFFERENCE
    return alike


def difference(first: NDArray[Any], second: NDArray[Any]) -> Floats:
    """Return how far pairs of thumbnails (n, 32, 32, 3) differ where they differ most, out of 255.

    One gain and offset are fitted for all channels; what a small misplacement of edges explains is
    left out; the rest is averaged over 4 x 4 pixels, and the largest value is taken.
    """
    a, b = (_centre(images) for images in (first, second))
    gain = np.sqrt((_power(a) + 1) / (_power(b) + 1)).clip(0.6, 1.6)
    b = b * gain
    inside = slice(MARGIN, SIDE - MARGIN)
    excess = np.maximum(np.abs(a - b) - EDGE_TOLERANCE * np.maximum(_range(a), _range(b)), 0)[
        :, inside, inside
    ]
    result: Floats = _means(excess, 4).reshape(len(a), -1).max(1)
    return result


def _centre(images: NDArray[Any]) -> Floats:
    values = images.astype(np.float32)
    result: Floats = values - values.mean((1, 2, 3), keepdims=True)
    return result


def _power(images: Floats) -> Floats:
    result: Floats = np.square(images).mean((1, 2, 3), keepdims=True)
    return result


def _range(images: Floats) -> Floats:
    """Return the largest minus the smallest value in the 3 x 3 neighbourhood of each pixel."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")

    def over(function: np.ufunc) -> Floats:
        rows = function.reduce([padded[:, i : i + SIDE] for i in range(3)])
        result: Floats = function.reduce([rows[:, :, i : i + SIDE] for i in range(3)])
        return result

    return over(np.maximum) - over(np.minimum)


def _align(fixed: NDArray[np.uint8], moving: NDArray[np.uint8]) -> Floats:
    """Enlarge and shift `moving` (n, 32, 32, 3) so that it lies best over `fixed`.

    The fit is judged by every second pixel.
    """
    n, side = len(fixed), len(PLACES)
    target = _centre(_gray(fixed)[:, PLACES][:, :, PLACES]).reshape(n, -1, 1)
    gray = _gray(moving)[..., 0]
    best, choice = np.full(n, np.inf, np.float32), np.zeros((n, 3), np.int64)
    for zoom, coarse in enumerate(_resampling(PLACES)):
        every = coarse.reshape(-1, SIDE)  # of all shifts
        moved = np.matmul(np.matmul(every, gray), every.T)
        moved = moved.reshape(n, len(SHIFTS), side, len(SHIFTS), side).transpose(0, 1, 3, 2, 4)
        moved = moved.reshape(n, -1, side * side)
        # the mean square of moved - its mean - target, but for what does not depend on the shift
        distance = moved.var(2) - 2 * np.matmul(moved, target)[:, :, 0] / (side * side)
        nearest = distance.argmin(1)
        value = distance[np.arange(n), nearest]
        nearer = value < best
        best[nearer] = value[nearer]
        dy, dx = np.divmod(nearest[nearer], len(SHIFTS))
        choice[nearer] = np.stack([np.full(len(dy), zoom), dy, dx], axis=1)
    whole = _resampling(np.arange(SIDE))
    rows, columns = whole[choice[:, 0], choice[:, 1]], whole[choice[:, 0], choice[:, 2]]
    lines = np.matmul(rows, moving.reshape(n, SIDE, -1).astype(np.float32))
    result: Floats = np.matmul(columns[:, None], lines.reshape(n, SIDE, SIDE, -1))
    return result


def _resampling(places: NDArray[np.int64]) -> Floats:
    """Return, for each zoom and shift, the matrix that resamples an axis linearly at some places:
    (zooms, shifts, places, 32).

    The axis is enlarged about the centre, then shifted by pixels.
    """
    centre, rows = (SIDE - 1) / 2, np.arange(len(places))
    result = np.zeros((len(ZOOMS), len(SHIFTS), len(places), SIDE), np.float32)
    for (i, zoom), (j, shift) in product(enumerate(ZOOMS), enumerate(SHIFTS)):
        place = ((places - centre) / zoom + centre + shift).clip(0, SIDE - 1)
        low = np.minimum(place.astype(int), SIDE - 2)
        share = (place - low).astype(np.float32)
        result[i, j, rows, low] = 1 - share
        result[i, j, rows, low + 1] += share
    return result


def _gray(images: NDArray[np.uint8]) -> Floats:
    result: Floats = images.mean(3, keepdims=True, dtype=np.float32)
    return result
