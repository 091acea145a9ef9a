"""Whether a model copies its training images, while it trains: near-duplicates among samples, and
how near these are to real images.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato import randomness
from sfumato.autoencoders import Autoencoder
from sfumato.conditioners import ConditioningInfo
from sfumato.data import Dataset, to_float
from sfumato.data.choice import choose_evenly
from sfumato.data.copies import NO_COPY, CopyIndex
from sfumato.generation.diffusion_model import Model, SamplingConfig
from sfumato.generation.pipeline import Pipeline
from sfumato.generation.request import ResolvedRequest
from sfumato.training.evidence import Copies

STEPS, MAX_REAL = 15, 500  # of denoising; real images that samples are compared with


class CopyCounter:
    """Counts near-duplicates of training images among samples, and among real images."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    @cached_property
    def index(self) -> CopyIndex:
        """All training images."""
        return CopyIndex.of(self.dataset)

    def find(self, images: Tensor) -> NDArray[np.bool_]:
        """Return which images (n, C, H, W) in [0, 1] are copies, (n,)."""
        result: NDArray[np.bool_] = self.index.find(images * 2 - 1) != NO_COPY
        return result

    def beside_real(self, found: NDArray[np.bool_]) -> Copies:
        """Return how many of some samples were found to be copies, beside the same of real images."""
        real_count, real = self._real
        return Copies(count=int(found.sum()), samples=len(found), real_count=real_count, real=real)

    @cached_property
    def _real(self) -> tuple[int, int]:
        """Copies among real images, and their number: held-out ones, and training images among the
        others.
        """
        count = total = 0
        for part, grouped in ((self.dataset.holdout, False), (self.dataset.training, True)):
            positions = choose_evenly(self.dataset.with_common_shape(part), MAX_REAL)
            if len(positions):
                groups = self.dataset.clusters[positions] if grouped else None
                images = to_float(self.dataset.images(positions)[0])
                count += int((self.index.find(images, groups=groups) != NO_COPY).sum())
                total += len(positions)
        return count, total


class SampleMeter(Protocol):
    """Measures samples (n, C, H, W) in [0, 1] beside real images, in the time that is left."""

    def figures(self, images: Tensor, index: CopyIndex, *, left_s: float) -> dict[str, Any]:
        """Return figures by name, as plain data."""


class CopySearch:
    """Samples a model under the contexts of training images, and searches all of these for copies.

    The noises and contexts are the same every time.
    """

    def __init__(
        self,
        *,
        dataset: Dataset,
        sampling: SamplingConfig,
        autoencoder: Autoencoder,
        info: ConditioningInfo,
        seed: int,
        meter: SampleMeter,
    ) -> None:
        self.dataset, self.autoencoder, self.info, self.seed = dataset, autoencoder, info, seed
        self.meter = meter
        self.sampling = replace(sampling, steps=STEPS)
        self.counter = CopyCounter(dataset)

    @property
    def predictions(self) -> int:
        """About how many predictions of the network a sample takes, with guidance."""
        return 2 * self.sampling.steps

    def copies(self, images: Tensor) -> Copies:
        """Return how many of these samples are copies, beside the same of real images."""
        return self.counter.beside_real(self.counter.find(images))

    def figures(self, images: Tensor, *, left_s: float) -> dict[str, Any]:
        """Return other figures of these samples, as far as there is time for them."""
        return self.meter.figures(images, self.counter.index, left_s=left_s)

    def images(self, average: Model, num: int) -> Tensor:
        """Return samples (num, C, H, W) in [0, 1]."""
        average.eval()
        training = self.dataset.with_common_shape(self.dataset.training)
        order = randomness.permutation(self.seed, "copies", index=0, size=len(training))
        pixels, _, chosen = self.dataset.images(training[np.resize(order, num)])
        context = average.conditioner.training_context(
            to_float(pixels), self.dataset.context(chosen), seed=self.seed, first=0
        )
        reads = average.conditioner.user_inputs
        pipeline = Pipeline(
            model=average,
            autoencoder=self.autoencoder,
            sampling=self.sampling,
            info=self.info,
            image_shape=self.dataset.image_shape,
        )
        request = ResolvedRequest.of(
            {name: value for name, value in context.items() if name in reads},
            self.dataset.image_shape,
            num,
        )
        with torch.no_grad():
            return pipeline.sample_request(request, seed=self.seed)
