"""Search for copies of training images: an index of all of them, by small thumbnails.

An image is a copy if it, or its mirror image, is a near-duplicate of a training image by the rule
of the data report. Images too small for that rule are compared by distance: see `CopyIndex.find`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sfumato.data.dataset import Dataset
from sfumato.data.duplicates import MIN_SIDE, near_duplicates
from sfumato.data.thumbnails import Floats, contrast_limits, signatures, stretch_contrast, thumbnail

BYTES_READ_AT_ONCE = 2**26
QUERIES_AT_ONCE, COMPARED_AT_ONCE = 1_000, 4_000  # images, and training images
# training images that are compared with each sample, and groups of near-duplicates among them:
# of fewer groups, one group may have hidden the others
CANDIDATES, CANDIDATE_GROUPS = 24, 8
CALIBRATED_ON = 1_000  # training images
SCALE_OF = 5  # groups of training images around a sample, whose distance is the scale of its own
FALSE_ALARMS = 0.005  # of training images that are compared with all others
# bounds of the ratio of distances: the lower one where training images are copies of one another;
# the last where there are too few to tell how often unseen images are that near to one
MIN_RATIO, MAX_RATIO, RATIO_OF_FEW = 0.25, 0.5, 1 / 3
NO_COPY = -1


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The training images nearest to some images, by distance of their signatures.

    A signature is 8 x 8 means of an image without brightness and contrast; of an image and its
    mirror image, the nearer one counts.

    Attributes:
        positions: of the nearest training image, in the dataset; shape (n,).
        first: distance to it, (n,).
        scale: distance to the nearest image of the SCALE_OF-th group of near-duplicates, or of the
            last one if there are fewer, (n,).
    """

    positions: NDArray[np.int64]
    first: Floats
    scale: Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class CopyIndex:
    """Training images by which copies are found; about 4 kB each.

    Attributes:
        positions: of the training images in the dataset, without exact copies; shape (N,).
        groups: the group of near-duplicates that each belongs to, (N,).
        thumbnails: (N, 32, 32, 3).
        limits: the values of pixels that are black and white in thumbnails.
        bits: of the dataset's pixels.
        side: pixels along the shortest side of the dataset's images.
    """

    positions: NDArray[np.int64]
    groups: NDArray[np.int64]
    thumbnails: NDArray[np.uint8]
    limits: tuple[float, float]
    bits: int
    side: int
    _signatures: Floats = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_signatures", signatures(self.thumbnails))

    @classmethod
    def of(cls, dataset: Dataset, positions: NDArray[np.int64] | None = None) -> CopyIndex:
        """Read the images at some positions, by default all that the dataset trains on."""
        positions = dataset.training if positions is None else positions
        _, firsts = np.unique([dataset.ids[i] for i in positions], return_index=True)
        positions = np.sort(positions[firsts])
        sample = positions[:: max(1, len(positions) // 1000)]
        parts = [part for _, part in _read_thumbnails(dataset, sample)]
        limits = contrast_limits(np.concatenate(parts))
        small = np.empty((len(positions), *parts[0].shape[1:]), np.uint8)
        for places, part in _read_thumbnails(dataset, positions):
            small[places] = stretch_contrast(part, limits)
        return cls(
            positions=positions,
            groups=dataset.clusters[positions],
            thumbnails=small,
            limits=limits,
            bits=dataset.config.bits,
            side=min(min(shape) for shape in dataset.pixel_format.shapes),
        )

    @property
    def rule(self) -> str:
        """The rule of `find`, in words."""
        return self.describe_rule()

    def describe_rule(self, name: str = "training") -> str:
        """Return the rule of `find` in words, where the images searched have another name."""
        if self.side >= MIN_SIDE:
            return f"near-duplicate of a {name} image, mirrored too"
        return (
            f"distance to a {name} image below {self._ratio:.2f} of that to the {SCALE_OF}th "
            f"group of them, mirrored too; at {self.side} pixels near-duplicates cannot be told"
        )

    def find(self, images: Tensor, *, groups: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Return the position of a training image that each image is a copy of, or -1, (n,).

        From MIN_SIDE pixels on, a copy is a near-duplicate, mirrored too; of several, the nearest
        is returned. Smaller images are copies if they are much nearer to one training image than
        to others: nearer than all but FALSE_ALARMS of the training images are to one another.

        Args:
            images: (n, C, H, W) in [-1, 1].
            groups: of each image, the group of near-duplicates, or several (n, g), left out of the
                search, to compare training images with the others.
        """
        return self.find_thumbnails(self.thumbnails_of(images), groups)

    def find_thumbnails(
        self, queries: NDArray[np.uint8], groups: NDArray[np.int64] | None = None
    ) -> NDArray[np.int64]:
        """Do as `find`, for thumbnails (n, 32, 32, 3)."""
        if not len(queries):
            return np.empty(0, np.int64)
        if self.side >= MIN_SIDE:
            return self._find_near_duplicates(queries, groups)
        found = self.neighbours_of(queries, groups)
        return np.where(found.first < self._ratio * found.scale, found.positions, NO_COPY)

    def neighbours(self, images: Tensor, *, groups: NDArray[np.int64] | None = None) -> Neighbours:
        """Find the nearest training images by signatures; for arguments, see `find`."""
        return self.neighbours_of(self.thumbnails_of(images), groups)

    def rows_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows of the index that hold the images at some of its positions."""
        result: NDArray[np.int64] = np.searchsorted(self.positions, positions)
        return result

    @property
    def calibration_rows(self) -> NDArray[np.int64]:
        """The rows of up to CALIBRATED_ON training images, evenly chosen."""
        chosen = np.linspace(0, len(self.positions) - 1, CALIBRATED_ON).round().astype(np.int64)
        return np.unique(chosen)

    @cached_property
    def leave_one_out(self) -> Neighbours:
        """The neighbours of the images at the calibration rows, outside of their groups."""
        chosen = self.calibration_rows
        return self.neighbours_of(self.thumbnails[chosen], self.groups[chosen])

    @cached_property
    def _ratio(self) -> float:
        """The ratio of distances below which an image too small for the rule is a copy."""
        left_out = self.leave_one_out
        valid = np.isfinite(left_out.first) & (left_out.scale > 0)
        ratios = np.sort(left_out.first[valid] / left_out.scale[valid])
        if not len(ratios):
            return MIN_RATIO
        most = MAX_RATIO if FALSE_ALARMS * len(ratios) >= 1 else RATIO_OF_FEW
        return min(most, max(MIN_RATIO, float(ratios[int(FALSE_ALARMS * len(ratios))])))

    def thumbnails_of(self, images: Tensor) -> NDArray[np.uint8]:
        """Return thumbnails (n, 32, 32, 3) of images in [-1, 1]; NaN becomes black."""
        most, kind = (255.0, np.uint8) if self.bits == 8 else (65535.0, np.uint16)
        values = ((images.detach().cpu().float().nan_to_num(-1.0) + 1) * (most / 2)).round()
        pixels = values.clamp(0, most).numpy().astype(kind)
        if not len(pixels):
            return self.thumbnails[:0]
        return stretch_contrast(np.stack([thumbnail(image) for image in pixels]), self.limits)

    def _find_near_duplicates(
        self, queries: NDArray[np.uint8], groups: NDArray[np.int64] | None
    ) -> NDArray[np.int64]:
        both, excluded = _with_mirrored(queries, groups)
        values = signatures(both)
        found = np.full(len(both), NO_COPY)
        distances = np.full(len(both), np.inf, np.float32)
        pending, count = np.arange(len(both)), CANDIDATES
        while len(pending):
            rows, near = self._nearest(
                values[pending], count, None if excluded is None else excluded[pending]
            )
            alike = self._are_near_duplicates(both, values, pending, rows) & np.isfinite(near)
            first = alike.argmax(1)
            hit = alike.any(1)
            found[pending[hit]] = self.positions[rows[hit, first[hit]]]
            distances[pending[hit]] = near[hit, first[hit]]
            crowded = ~hit & (_count_distinct(self.groups[rows]) < CANDIDATE_GROUPS)
            pending = pending[crowded] if count < len(self.positions) else pending[:0]
            count *= 4
        nearer = distances.reshape(2, -1).argmin(0)
        result: NDArray[np.int64] = found.reshape(2, -1)[nearer, np.arange(len(queries))]
        return result

    def _are_near_duplicates(
        self,
        queries: NDArray[np.uint8],
        values: Floats,
        pending: NDArray[np.int64],
        rows: NDArray[np.int64],
    ) -> NDArray[np.bool_]:
        """Return whether each of the pending queries is a near-duplicate of the images at rows.

        Rows are (q, k).
        """
        chosen, numbers = np.unique(rows, return_inverse=True)
        pairs = np.stack(
            [np.repeat(pending, rows.shape[1]), len(queries) + numbers.reshape(-1)], axis=1
        )
        return near_duplicates(
            np.concatenate([queries, self.thumbnails[chosen]]),
            np.concatenate([values, self._signatures[chosen]]),
            pairs,
        ).reshape(rows.shape)

    def neighbours_of(
        self, queries: NDArray[np.uint8], groups: NDArray[np.int64] | None = None
    ) -> Neighbours:
        """Do as `neighbours`, for thumbnails (n, 32, 32, 3)."""
        if not len(queries):
            nothing = np.empty(0, np.float32)
            return Neighbours(np.empty(0, np.int64), nothing, nothing)
        both, excluded = _with_mirrored(queries, groups)
        values, count = signatures(both), CANDIDATES
        while True:
            rows, near = self._nearest(values, count, excluded)
            rows, near = (np.concatenate(np.split(part, 2), axis=1) for part in (rows, near))
            order = near.argsort(1, kind="stable")
            rows, near = np.take_along_axis(rows, order, 1), np.take_along_axis(near, order, 1)
            scale, enough = _distance_of_group(self.groups[rows], near, SCALE_OF)
            if enough.all() or count >= len(self.positions):
                return Neighbours(self.positions[rows[:, 0]], near[:, 0], scale)
            count *= 4

    def _nearest(
        self, values: Floats, count: int, excluded: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.int64], Floats]:
        """Return the rows of the nearest training images and their distances, (q, count) each.

        They are in ascending order; a distance is infinite where the image is left out.
        """
        parts = [
            self._nearest_of_few(values[part], count, None if excluded is None else excluded[part])
            for part in np.array_split(np.arange(len(values)), len(values) // QUERIES_AT_ONCE + 1)
            if len(part)
        ]
        return np.concatenate([rows for rows, _ in parts]), np.concatenate(
            [near for _, near in parts]
        )

    def _nearest_of_few(
        self, values: Floats, count: int, excluded: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.int64], Floats]:
        count = min(count, len(self.positions))
        rows = np.empty((len(values), 0), np.int64)
        near = np.empty((len(values), 0), np.float32)
        for start in range(0, len(self.positions), COMPARED_AT_ONCE):
            part = self._signatures[start : start + COMPARED_AT_ONCE]
            squares = (
                np.square(values).sum(1)[:, None] + np.square(part).sum(1) - 2 * values @ part.T
            )
            if excluded is not None:
                here = self.groups[start : start + COMPARED_AT_ONCE]
                squares[(excluded[:, :, None] == here).any(1)] = np.inf
            near = np.concatenate([near, squares], axis=1)
            rows = np.concatenate(
                [rows, np.broadcast_to(np.arange(start, start + len(part)), squares.shape)], axis=1
            )
            chosen = np.argpartition(near, min(count, near.shape[1]) - 1, axis=1)[:, :count]
            near, rows = np.take_along_axis(near, chosen, 1), np.take_along_axis(rows, chosen, 1)
        # squares are off by rounding: an exact copy is at distance 0
        exact = np.stack(
            [
                np.linalg.norm(self._signatures[row] - value, axis=1)
                for row, value in zip(rows, values, strict=True)
            ]
        )
        exact[np.isinf(near)] = np.inf
        order = np.lexsort((rows, exact), axis=1)
        return np.take_along_axis(rows, order, 1), np.take_along_axis(exact, order, 1)


def _with_mirrored(
    queries: NDArray[np.uint8], groups: NDArray[np.int64] | None
) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
    """Append the mirror images, and their groups."""
    both = np.concatenate([queries, queries[:, :, ::-1]])
    if groups is None:
        return both, None
    columns = groups.reshape(len(groups), -1)
    return both, np.concatenate([columns, columns])


def _count_distinct(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number of different values in each row of (q, k)."""
    ordered = np.sort(groups, axis=1)
    result: NDArray[np.int64] = (np.diff(ordered, axis=1) != 0).sum(1) + 1
    return result


def _distance_of_group(
    groups: NDArray[np.int64], near: Floats, number: int
) -> tuple[Floats, NDArray[np.bool_]]:
    """Return the distance (q,) to the `number`-th group, and whether there are so many groups.

    Distances (q, k) are in ascending order. Of fewer groups, that of the last one is returned.
    """
    result, enough = np.empty(len(near), np.float32), np.empty(len(near), bool)
    for row, (here, distances) in enumerate(zip(groups, near, strict=True)):
        here = here[np.isfinite(distances)]
        _, firsts = np.unique(here, return_index=True)
        enough[row] = len(firsts) >= number
        result[row] = distances[np.sort(firsts)[:number][-1]] if len(firsts) else np.inf
    return result, enough


def _read_thumbnails(
    dataset: Dataset, positions: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
    """Yield thumbnails (n, 32, 32, 3) of the images at some positions, and their places in these.

    They are computed from pixels where the dataset does not keep them.
    """
    shapes = dataset.shapes[positions]
    for shape in np.unique(shapes):
        places = np.flatnonzero(shapes == shape)
        height, width = dataset.pixel_format.shapes[shape]
        size = dataset.config.channels * height * width * dataset.config.bits // 8
        for part in np.array_split(places, len(places) * size // BYTES_READ_AT_ONCE + 1):
            if dataset.read_thumbnails is not None:
                yield part, dataset.read_thumbnails(positions[part])
            else:
                pixels = dataset.images(positions[part]).pixels.numpy()
                yield part, np.stack([thumbnail(image) for image in pixels])
