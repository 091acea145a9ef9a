"""Whether samples are copies of training images, by comparison with images that were not learned.

Copies are near-duplicates of training images, in any of them. Whether samples are merely close is
judged in two spaces, by distances that unseen images have in one of a hundred cases.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sfumato.data.copies import CALIBRATED_ON, NO_COPY, CopyIndex, Neighbours
from sfumato.evaluation.figures import NO_EXTRACTOR, Figure
from sfumato.networks.perceptual import Features
from sfumato.training.evidence import Copies

CLOSE_FALSE_ALARMS = 0.01
MAP_SIDE, MAP_INPUT = 4, 32  # places of a feature map along a side, and pixels it is computed from
MAX_MAPPED = 5_000  # training images whose feature maps samples are compared with
MAPPED_AT_ONCE = 250
MOST_COPIED = 5  # training images that are named together
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Memorization:
    """How near some images are to training images. Figures are None without images.

    Attributes:
        copies: proportion of near-duplicates of a training image; see `CopyIndex.find`.
        close: proportion nearer to a training image than 99 % of the training images are to
            others, by signatures of 8 x 8.
        close_in_features: the same by feature maps of 4 x 4.
        nearest: mean distance to the nearest training image, by signatures.
        distance_test: z of the Mann-Whitney test of these distances against those of training
            images that are left out, each with its near-duplicates; far below 0 where the images
            are nearer to training images than new ones would be.
        authentic: proportion farther from the nearest training image than that is from the next.
        copied: positions of the training images that are copied, or -1, (n,).
        neighbours: the nearest training images.
    """

    copies: Figure | None
    close: Figure | None
    close_in_features: Figure | None
    nearest: Figure | None
    distance_test: Figure | None
    authentic: Figure | None
    copied: NDArray[np.int64]
    neighbours: Neighbours

    def figures(self) -> dict[str, Figure | None]:
        """Return the figures by name."""
        return {
            name: getattr(self, name)
            for name in (
                "copies", "close", "close_in_features", "nearest", "distance_test", "authentic",
            )
        }  # fmt: skip


class CopyMeter:
    """Measures how near images are to training images.

    Attributes:
        index: the training images.
        rule: what counts as a copy, in words.

    Args:
        features: the network whose feature maps are compared; without one they are not.
        name: what the training images are called.
    """

    def __init__(
        self, index: CopyIndex, *, features: Features | None = None, name: str = "training"
    ) -> None:
        self.index = index
        self.rule = self.index.describe_rule(name)
        self._reference = f"{len(self.index.positions):,} {name} images"
        self._maps = None if features is None else _MapSpace(features, self.index, name)

    @cached_property
    def left_out(self) -> Memorization:
        """Figures of up to 1,000 training images, compared with those outside of their groups.

        A group is one of near-duplicates. A model that copies nothing would get the same.
        """
        rows = self.index.calibration_rows
        return self._measure(
            self.index.thumbnails[rows], self.index.leave_one_out, self.index.groups[rows]
        )

    @cached_property
    def _unseen(self) -> Floats:
        """Distances of training images to those outside of their groups, in ascending order."""
        first = self.index.leave_one_out.first
        return np.sort(first[np.isfinite(first)])

    @property
    def _close(self) -> float:
        """The distance below which an image is close."""
        unseen = self._unseen
        return float(unseen[int(CLOSE_FALSE_ALARMS * len(unseen))]) if len(unseen) else 0.0

    def measure(self, images: Tensor) -> Memorization:
        """Return the figures of images (n, C, H, W) in [-1, 1]."""
        thumbnails = self.index.thumbnails_of(images)
        return self._measure(thumbnails, self.index.neighbours_of(thumbnails), None)

    def distances(self, images: Tensor) -> dict[str, Figure | None]:
        """Return the figures that only take distances by signatures; see `measure`."""
        return self._distances(self.index.neighbours(images))

    def _distances(self, neighbours: Neighbours) -> dict[str, Figure | None]:
        words = {"reference": self._reference}
        finite = neighbours.first[np.isfinite(neighbours.first)]
        return {
            "close": Figure.proportion(
                neighbours.first < self._close,
                metric=f"closer than {1 - CLOSE_FALSE_ALARMS:.0%} of unseen images by 8 x 8 means",
                **words,
            ),
            "nearest": Figure.mean(
                neighbours.first, metric="distance to the nearest image by 8 x 8 means", **words
            ),
            "distance_test": distance_test(finite, self._unseen, **words),
        }

    def _measure(
        self,
        thumbnails: NDArray[np.uint8],
        neighbours: Neighbours,
        groups: NDArray[np.int64] | None,
    ) -> Memorization:
        copied = self.index.find_thumbnails(thumbnails, groups)
        words = {"reference": self._reference}
        close_in_features = None
        if self._maps is not None:
            close_in_features = Figure.proportion(
                self._maps.close(thumbnails, groups),
                metric=f"closer than {1 - CLOSE_FALSE_ALARMS:.0%} of unseen images by feature maps",
                extractor=self._maps.name,
                reference=self._maps.reference,
            )
        return Memorization(
            copies=Figure.proportion(copied != NO_COPY, metric=self.rule, **words),
            **self._distances(neighbours),
            close_in_features=close_in_features,
            authentic=Figure.proportion(
                self._authentic(neighbours, groups),
                metric="farther from the nearest image than that is from the next",
                **words,
            ),
            copied=copied,
            neighbours=neighbours,
        )

    def _authentic(
        self, neighbours: Neighbours, groups: NDArray[np.int64] | None
    ) -> NDArray[np.bool_]:
        """Return whether images are farther from the nearest one than that is from the next.

        Source: Alaa et al. 2022 (arXiv:2102.08921), sec. 3.3.
        """
        if not len(neighbours.positions):
            return np.zeros(0, bool)
        rows = self.index.rows_of(neighbours.positions)
        excluded = self.index.groups[rows][:, None]
        if groups is not None:  # the image itself is not the next
            excluded = np.concatenate([excluded, groups[:, None]], axis=1)
        following = self.index.neighbours_of(self.index.thumbnails[rows], excluded)
        result: NDArray[np.bool_] = neighbours.first > following.first
        return result


def distance_test(distances: Floats, unseen: Floats, *, reference: str) -> Figure | None:
    """Return the z of the Mann-Whitney test that images are as far from the training set as unseen.

    It is below 0 where they are nearer. The interval is that of z where both are alike.

    Source: Meehan et al. 2020 (arXiv:2004.05675), sec. 3, with one cell.
    """
    if not len(distances) or not len(unseen):
        return None
    from scipy.stats import rankdata

    n, m = len(distances), len(unseen)
    ranks = rankdata(np.concatenate([distances, unseen]))
    u = ranks[:n].sum() - n * (n + 1) / 2
    _, ties = np.unique(ranks, return_counts=True)
    total = n + m
    correction = (ties.astype(float) ** 3 - ties).sum() / (total * (total - 1))
    variance = n * m / 12 * (total + 1 - correction)
    z = float((u - n * m / 2) / math.sqrt(variance)) if variance > 0 else 0.0
    return Figure(
        value=z,
        low=z - 1.96,
        high=z + 1.96,
        n=n,
        metric="z of distances by 8 x 8 means against those of the reference, each left out",
        extractor=NO_EXTRACTOR,
        reference=reference,
    )


class _MapSpace:
    """Feature maps of training images, and the distance below which an image is close."""

    def __init__(self, features: Features, index: CopyIndex, name: str) -> None:
        self.features, self.name = features, features.name
        self.rows = np.unique(
            np.linspace(0, len(index.positions) - 1, MAX_MAPPED).round().astype(np.int64)
        )
        self.groups = index.groups[self.rows]
        self.maps = self._map(index.thumbnails[self.rows])
        total = len(index.positions)
        self.reference = (
            f"{len(self.rows):,}{f' of {total:,}' if total > len(self.rows) else ''} {name} images"
        )
        chosen = self.rows[:: max(1, len(self.rows) // CALIBRATED_ON)]
        distances = np.sort(self._nearest(index.thumbnails[chosen], index.groups[chosen]))
        distances = distances[np.isfinite(distances)]
        self.threshold = (
            float(distances[int(CLOSE_FALSE_ALARMS * len(distances))]) if len(distances) else 0.0
        )

    def close(
        self, thumbnails: NDArray[np.uint8], groups: NDArray[np.int64] | None
    ) -> NDArray[np.bool_]:
        """Return whether images are closer to a training image than the threshold."""
        result: NDArray[np.bool_] = self._nearest(thumbnails, groups) < self.threshold
        return result

    def _nearest(
        self, thumbnails: NDArray[np.uint8], groups: NDArray[np.int64] | None
    ) -> NDArray[np.float32]:
        """Return the squared distance to the nearest training image, mirrored too, (n,)."""
        nearest = np.full(len(thumbnails), np.inf, np.float32)
        for flipped in (thumbnails, thumbnails[:, :, ::-1]):
            for part in np.array_split(np.arange(len(thumbnails)), len(thumbnails) // 1000 + 1):
                distances = 2 - 2 * (self._map(flipped[part]) @ self.maps.T).numpy()
                if groups is not None:
                    distances[groups[part][:, None] == self.groups] = np.inf
                if len(part):
                    nearest[part] = np.minimum(nearest[part], distances.min(1))
        return nearest

    @torch.no_grad()
    def _map(self, thumbnails: NDArray[np.uint8]) -> Tensor:
        """Return a map of 4 x 4 places of each thumbnail, flat and of unit length."""
        parts = []
        for part in np.array_split(thumbnails, len(thumbnails) // MAPPED_AT_ONCE + 1):
            images = torch.from_numpy(np.ascontiguousarray(part)).permute(0, 3, 1, 2)
            maps = self.features.maps(images.float() / 127.5 - 1)
            fitting = [each for each in maps if min(each.shape[2:]) >= MAP_SIDE] or maps[:1]
            small = F.adaptive_avg_pool2d(fitting[-1], MAP_SIDE).flatten(1)
            parts.append(F.normalize(small, dim=1))
        return torch.cat(parts)


def beside_unseen(samples: Figure, unseen: Sequence[Figure | None]) -> Copies:
    """Return the copies among samples, beside those among images that were not learned."""
    known = [figure for figure in unseen if figure is not None]
    return Copies(
        count=_hits(samples),
        samples=samples.n,
        real_count=sum(map(_hits, known)),
        real=sum(figure.n for figure in known),
    )


def _hits(figure: Figure) -> int:
    return round(figure.value * figure.n)


def copies_sentence(
    samples: Memorization, unseen: Sequence[Figure | None], *, name: str = "training"
) -> str:
    """Return a sentence on copies, beside the figures of images that were not learned."""
    figure = samples.copies
    if figure is None:
        return f"no samples were compared with {name} images"
    copies = beside_unseen(figure, unseen)
    counts = Counter(samples.copied[samples.copied != NO_COPY].tolist())
    hits = sum(counts.values())
    beside = (
        f"unseen images: {copies.real_count} of {copies.real}"
        if copies.real
        else "no other images show how many would be by chance"
    )
    low, high = (0.0 if bound is None else bound for bound in (figure.low, figure.high))
    sentence = (
        f"{hits} of {figure.n} samples [{low:.1%}, {high:.1%}] are copies of {name} images "
        f"({beside})"
    )
    often = [number for _, number in counts.most_common(MOST_COPIED)]
    if len(counts) > MOST_COPIED and sum(often) > len(often):
        sentence += f"; {sum(often)} of them are of the same {len(often)}"
    verdict = "it copies" if copies.found else "no sign of copying"
    return f"{verdict}: {sentence}"
