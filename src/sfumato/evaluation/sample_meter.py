"""Figures of the samples of a run while it trains, by the time that is left for them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sfumato.data import Dataset
from sfumato.data.copies import CopyIndex
from sfumato.distributed import seconds
from sfumato.evaluation.extractors import extractor, pooled
from sfumato.evaluation.fidelity import choose_reference
from sfumato.evaluation.memorization import CopyMeter
from sfumato.evaluation.quality import MAX_COMPARED, QualityMeter
from sfumato.networks.perceptual import Features

TIMED = 4  # images by whose features the time of all others is guessed


class SampleMeter:
    """Measures samples beside held-out and training images: see `Memorization` and `Quality`.

    Distances to training images take little time. Features of a network are compared where their
    time is left: those of real images are only computed once, and kept for `sfumato evaluate`.

    Args:
        reads: the conditions that the model reads.
    """

    def __init__(self, dataset: Dataset, *, reads: tuple[str, ...] = ()) -> None:
        self.dataset = dataset
        self.reference = choose_reference(dataset, reads)

    def figures(self, images: Tensor, index: CopyIndex, *, left_s: float) -> dict[str, Any]:
        """Return figures of images (n, C, H, W) in [0, 1] by name, as plain data.

        Args:
            index: the training images.
            left_s: seconds that the features may take.
        """
        begun, images = seconds(), images * 2 - 1
        figures = CopyMeter(index).distances(images)
        if left_s > self._features_s(len(images)) + seconds() - begun:
            figures |= self._quality.measure(images).figures()
        return {
            name: figure.plain() for name, figure in sorted(figures.items()) if figure is not None
        }

    @cached_property
    def _network(self) -> Features:
        return extractor("auto")

    @cached_property
    def _quality(self) -> QualityMeter:
        return QualityMeter(
            self.dataset,
            self._network,
            training=self.reference.training,
            held_out=self.reference.held_out,
        )

    @cached_property
    def _image_s(self) -> float:
        """About how many seconds the features of an image take."""
        images = torch.zeros(TIMED, *self.dataset.image_shape)
        pooled(self._network, images[:1])
        begun = seconds()
        pooled(self._network, images)
        return (seconds() - begun) / TIMED

    def _features_s(self, count: int) -> float:
        """Return about how many seconds the features of samples take, and those of real images."""
        if "_quality" not in self.__dict__:
            parts = (self.reference.training, self.reference.held_out)
            count += sum(min(len(part), MAX_COMPARED) for part in parts)
        return self._image_s * count
