"""The images of a set that a model memorizes first: those that are far from all others, and those
that appear many times.

A model that begins to memorize does so where images are sparse (Merger & Goldt 2026,
arXiv:2606.14390), and an image that appears k times is seen k times as often as the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfumato.data.copies import CopyIndex
from sfumato.data.thumbnails import SIDE, contrast_limits, stretch_contrast

MAX_SPARSE, MAX_SPARSE_SHARE = 12, 0.25  # images that are named, and their share of a small set
MAX_REPEATED = 6  # groups that are named
SCREENED = 20_000  # images, spread evenly over the set, among which the sparsest are searched
# of these, whose distance to all images is measured: the farthest from some 1,000 images
MEASURED_EXACTLY = 500


@dataclass(frozen=True)
class SparseImage:
    """An image that is far from all others.

    Attributes:
        position: in the listing.
        distance: to the nearest other image, by signatures; near-duplicates do not count.
        nearest: position of that image.
    """

    position: int
    distance: float
    nearest: int


@dataclass(frozen=True, kw_only=True)
class MemorizationRisk:
    """The images that are memorized first.

    Attributes:
        searched: images among which the sparsest were searched, near-duplicates counted as one.
        total: images of the set, near-duplicates counted as one.
        median: distance of the median image to its nearest other one.
        sparse: the images farthest from all others, the farthest first.
        repeated: positions of the images of the largest groups of near-duplicates, the largest
            group first.
    """

    searched: int
    total: int
    median: float
    sparse: tuple[SparseImage, ...]
    repeated: tuple[tuple[int, ...], ...]

    def times(self, image: SparseImage) -> float:
        """Return the distance of an image, in median distances."""
        return image.distance / max(self.median, 1e-6)

    def sentence(self, names: Sequence[str]) -> str:
        """Return which images are memorized first; "" if the set has too few to say.

        Args:
            names: of the images in the listing.
        """
        parts = []
        if self.sparse:
            first = self.sparse[0]
            parts.append(
                f"those farthest from all others ({names[first.position]}, "
                f"{self.times(first):.1f} times as far from the nearest as the median image"
                f"{_and_more(len(self.sparse) - 1)})"
            )
        if self.repeated:
            largest = self.repeated[0]
            parts.append(
                f"those that appear most often ({names[largest[0]]}, {len(largest)} times"
                f"{_and_more(len(self.repeated) - 1)})"
            )
        if not parts:
            return ""
        searched = (
            f" ({self.searched:,} of {self.total:,} images were searched)"
            if self.searched < self.total
            else ""
        )
        return f"Memorized first, if any: {' and '.join(parts)}{searched}."

    def plain(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the images as plain data, for JSON."""
        return {
            "searched": self.searched,
            "images": self.total,
            "median_distance": round(self.median, 3),
            "sparse": [
                {
                    "file": names[image.position],
                    "distance": round(image.distance, 3),
                    "medians": round(self.times(image), 2),
                    "nearest": names[image.nearest],
                }
                for image in self.sparse
            ],
            "repeated": [[names[position] for position in group] for group in self.repeated],
        }


def _and_more(count: int) -> str:
    return f", and {count} more" if count else ""


def images_at_risk(
    thumbnails: NDArray[np.uint8], groups: NDArray[np.int64], positions: NDArray[np.int64]
) -> MemorizationRisk:
    """Find the images that are memorized first.

    Distances are those of 8 x 8 means without brightness and contrast, to the nearest image of
    another group or its mirror image.

    Args:
        thumbnails: of the images that can be learned from, (N, 32, 32, 3).
        groups: the group of near-duplicates of each, (N,).
        positions: of each in the listing, (N,).
    """
    limits = contrast_limits(thumbnails)
    index = CopyIndex(
        positions=positions,
        groups=groups,
        thumbnails=stretch_contrast(thumbnails, limits),
        limits=limits,
        bits=8,
        side=SIDE,
    )
    _, leaders = np.unique(groups, return_index=True)
    searched = np.sort(leaders)
    if len(searched) > SCREENED:
        spread = np.linspace(0, len(searched) - 1, SCREENED).round().astype(np.int64)
        searched = searched[spread]
    rows, distances, nearest = _distances(index, searched)
    order = np.argsort(-distances, kind="stable")[
        : min(MAX_SPARSE, int(MAX_SPARSE_SHARE * len(searched)))
    ]
    return MemorizationRisk(
        searched=len(searched),
        total=len(leaders),
        median=_median(index),
        sparse=tuple(
            SparseImage(int(positions[rows[i]]), float(distances[i]), int(nearest[i]))
            for i in order
        ),
        repeated=_largest(groups, positions),
    )


def _distances(
    index: CopyIndex, rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """Return those of some rows that may be farthest from all others, and for each the distance
    to the nearest row of another group and its position.

    The distance to a part of the images bounds that to all from above: of many images, those
    farthest from the calibration rows are compared with all.
    """
    if len(rows) > 2 * MEASURED_EXACTLY:
        few = index.calibration_rows
        bounds = CopyIndex(
            positions=index.positions[few],
            groups=index.groups[few],
            thumbnails=index.thumbnails[few],
            limits=index.limits,
            bits=index.bits,
            side=index.side,
        ).neighbours_of(index.thumbnails[rows], index.groups[rows])
        rows = rows[np.argsort(-bounds.first, kind="stable")[:MEASURED_EXACTLY]]
    found = index.neighbours_of(index.thumbnails[rows], index.groups[rows])
    finite = np.isfinite(found.first)
    return rows[finite], found.first[finite], found.positions[finite]


def _median(index: CopyIndex) -> float:
    """Return the median distance to the nearest image of another group, of up to 1,000 images."""
    distances = index.leave_one_out.first
    finite = distances[np.isfinite(distances)]
    return float(np.median(finite)) if len(finite) else 0.0


def _largest(
    groups: NDArray[np.int64], positions: NDArray[np.int64]
) -> tuple[tuple[int, ...], ...]:
    """Return the positions of the images of the largest groups of more than one."""
    numbers, sizes = np.unique(groups, return_counts=True)
    order = np.argsort(-sizes, kind="stable")[:MAX_REPEATED]
    return tuple(
        tuple(positions[groups == number].tolist())
        for number, size in zip(numbers[order], sizes[order], strict=True)
        if size > 1
    )
