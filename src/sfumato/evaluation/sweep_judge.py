"""The judge of a sweep: kernel distance to held-out images, copies, and categories as requested."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.evaluation.classifier import Classifier
from sfumato.evaluation.distances import (
    DistanceEstimate,
    KernelComparison,
    KernelReference,
    compare_kernels,
    paired_difference,
)
from sfumato.evaluation.extractors import pooled
from sfumato.evaluation.figures import Estimate, Figure
from sfumato.evaluation.quality import KID
from sfumato.evaluation.sweep_result import Setting, SettingRow
from sfumato.networks.perceptual import Features
from sfumato.training.copy_search import CopyCounter

RESAMPLES = 1000
COPIES, MISREADS = "copies", "category accuracy is lower"


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """What is known of n samples.

    Attributes:
        features: (n, d).
        copied: whether each is a copy of a training image, (n,).
        as_requested: whether each is classified as the requested category, (n,), as 0 or 1; NaN where
            none was requested, or nothing classifies.
    """

    features: Tensor
    copied: NDArray[np.bool_]
    as_requested: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def __add__(self, other: Samples) -> Samples:
        return Samples(
            features=torch.cat([self.features, other.features]),
            copied=np.concatenate([self.copied, other.copied]),
            as_requested=torch.cat([self.as_requested, other.as_requested]),
        )

    def first(self, count: int) -> Samples:
        """Return the first samples."""
        if count >= len(self):
            return self
        return Samples(
            features=self.features[:count],
            copied=self.copied[:count],
            as_requested=self.as_requested[:count],
        )


class Judge:
    """Reads samples, and compares those of a setting with those of the run's own setting.

    Args:
        network: in whose features images are compared.
        held_out: features of held-out images, (m, d).
        copies: counts copies of training images.
        labels: the category requested of each sample by its number, or -1, (N,).
        classifier: of the categories.
    """

    def __init__(
        self,
        *,
        network: Features,
        held_out: Tensor,
        copies: CopyCounter,
        labels: Tensor | None = None,
        classifier: Classifier | None = None,
    ) -> None:
        self.network, self.copies = network, copies
        self.labels, self.classifier = labels, classifier
        self.reference = KernelReference(held_out, resamples=RESAMPLES)
        copies.beside_real(np.zeros(0, bool))  # prepared before samples are timed
        self._compared = WeakKeyDictionary[Samples, KernelComparison]()

    def read(self, images: Tensor, numbers: range) -> Samples:
        """Return what the judge keeps of images (n, C, H, W) in [0, 1], with these numbers."""
        return Samples(
            features=pooled(self.network, images * 2 - 1),
            copied=self.copies.find(images),
            as_requested=self._as_requested(images, numbers),
        )

    def _as_requested(self, images: Tensor, numbers: range) -> Tensor:
        if self.classifier is None or self.labels is None:
            return torch.full((len(images),), torch.nan)
        requested = self.labels[numbers.start : numbers.stop]
        correct = (self.classifier.predict(images * 2 - 1)[0] == requested).float()
        return correct.where(requested >= 0, torch.nan)

    def row(self, setting: Setting, samples: Samples, own: Samples | None) -> SettingRow:
        """Return the figures of a setting beside as many samples of the run's own, None for itself."""
        copies = Figure.proportion(
            samples.copied,
            metric=self.copies.index.rule,
            reference=f"{len(self.copies.index.positions):,} training images",
        )
        assert copies is not None
        estimate = self._compare(samples).estimates[0]
        return SettingRow(
            setting=setting,
            kid=self._figure(estimate, len(samples), KID),
            difference=None
            if own is None
            else self._figure(
                self.difference(samples, own), len(samples), f"{KID} less that of the own setting"
            ),
            copies=copies,
            category_accuracy=Estimate.of(samples.as_requested).figure(
                "classified as the requested category",
                "none" if self.classifier is None else self.classifier.name,
            ),
            out=self._objection(samples, own),
        )

    def difference(self, first: Samples, second: Samples) -> DistanceEstimate:
        """Return the kernel distance of samples minus that of others with the same numbers."""
        return paired_difference(self._compare(first), self._compare(second))

    def _compare(self, samples: Samples) -> KernelComparison:
        """Return the kernel distance of samples; that of the run's own is needed for all others."""
        if samples not in self._compared:
            self._compared[samples] = compare_kernels(samples.features, [self.reference])
        return self._compared[samples]

    def _objection(self, samples: Samples, own: Samples | None) -> str:
        """Return why a setting cannot be recommended whatever its distance; "" for no reason."""
        if self.copies.beside_real(samples.copied).found:
            return COPIES
        if own is not None and Estimate.of_mean(samples.as_requested - own.as_requested).high < 0:
            return MISREADS
        return ""

    def _figure(self, estimate: DistanceEstimate, n: int, metric: str) -> Figure:
        reference = f"{len(self.reference.features):,} held-out images"
        return estimate.figure(n=n, metric=metric, extractor=self.network.name, reference=reference)
