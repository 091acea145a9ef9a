"""How good samples are as a set, in the features of a frozen network: kernel distances to held-out
and to training images, the share that looks real, and the share of the variety that they cover.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sfumato import randomness
from sfumato.data import Dataset, to_float
from sfumato.data.array_cache import load_array, save_array
from sfumato.data.choice import choose_evenly
from sfumato.evaluation.coverage import (
    MANIFOLD_NEIGHBOURS,
    NEIGHBOURS,
    Manifold,
    RealImages,
)
from sfumato.evaluation.distances import (
    FRECHET_IMAGES_PER_DIMENSION,
    DistanceEstimate,
    KernelReference,
    Moments,
    compare_kernels,
    frechet_interval_to,
)
from sfumato.evaluation.extractors import pooled
from sfumato.evaluation.figures import Figure
from sfumato.evaluation.statistics import ReferenceStatistics
from sfumato.networks.perceptual import Features

FEWEST = 2  # images on either side of a kernel distance
MAX_COMPARED = 2_000  # images of either reference, for all but the Fréchet distance
MAX_SAMPLES = 5_000  # for all but the Fréchet distance
MAX_FRECHET = 50_000  # images of the reference of a Fréchet distance
READ_AT_ONCE = 500
KID, FRECHET = "kernel distance (KID)", "Fréchet distance (FID)"


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Figures of a set of images. They are None where too few images are compared.

    Attributes:
        kid_held_out, kid_training: kernel distances to held-out and to training images.
        kid_difference: the former minus the latter, of the same images: above 0 where they are
            nearer to the training images than to new ones.
        good: share of images that lie where real ones do (clipped density).
        variety: share of the variety of real images that they cover (clipped coverage).
        precision, recall: share of images among the training images, and the reverse; biased for
            few images.
        frechet: to training images.
    """

    kid_held_out: Figure | None
    kid_training: Figure | None
    kid_difference: Figure | None
    good: Figure | None
    variety: Figure | None
    precision: Figure | None
    recall: Figure | None
    frechet: Figure | None

    def figures(self) -> dict[str, Figure | None]:
        """Return the figures by name."""
        return dict(vars(self))


class QualityMeter:
    """Compares images with real ones in the features of a network.

    Args:
        network: the frozen network.
        training, held_out: positions of the real images, all of one shape.
        frechet: whether a Fréchet distance may be wanted, for which more images are read.
        statistics: what the Fréchet distance compares with; by default the training images.
        name: what the training images are called.
        on_progress: called with the fraction of the real images whose features are computed.
    """

    def __init__(
        self,
        dataset: Dataset,
        network: Features,
        *,
        training: NDArray[np.int64],
        held_out: NDArray[np.int64],
        frechet: bool = False,
        statistics: ReferenceStatistics | None = None,
        name: str = "training",
        on_progress: Callable[[float], None] = lambda fraction: None,
    ) -> None:
        self.network, self.name = network, name
        order = randomness.permutation(0, "evaluation", index=0, size=len(training))
        many = frechet and statistics is None
        chosen = training[order][: MAX_FRECHET if many else MAX_COMPARED]
        self.training = real_features(
            dataset, network, chosen, on_progress=lambda part: on_progress(0.8 * part)
        )
        self.held_out = real_features(
            dataset, network, choose_evenly(held_out, MAX_COMPARED),
            on_progress=lambda part: on_progress(0.8 + 0.2 * part),
        )  # fmt: skip
        self.total, self._statistics = len(training), statistics
        compared = self.training[:MAX_COMPARED]
        self._training = KernelReference(compared) if len(compared) >= FEWEST else None
        self._held_out = KernelReference(self.held_out) if len(self.held_out) >= FEWEST else None
        self._real = RealImages(compared) if len(compared) > NEIGHBOURS else None
        self._manifold = Manifold(compared) if len(compared) > MANIFOLD_NEIGHBOURS else None

    def features(self, images: Tensor) -> Tensor:
        """Return features (n, d) of images in [-1, 1]."""
        return pooled(self.network, images)

    def measure(self, images: Tensor) -> Quality:
        """Return the figures of images (n, C, H, W) in [-1, 1]."""
        return self._measure(self.features(images.nan_to_num(0.0)), self._held_out)

    def measure_held_out(self) -> Quality:
        """Return the figures of the held-out images; the first half is compared with the second."""
        half = self.held_out[1::2]
        reference = KernelReference(half) if len(half) >= FEWEST else None
        quality = self._measure(self.held_out, None)
        kid = self._kernel_figures(self.held_out[::2], reference, None)[0]
        return Quality(**{**quality.figures(), "kid_held_out": kid})

    def _measure(self, features: Tensor, held_out: KernelReference | None) -> Quality:
        few = features[:MAX_SAMPLES]
        kernels = self._kernel_figures(few, held_out, self._training)
        good, variety = self._coverage(few)
        precision, recall = self._precision_recall(few)
        return Quality(
            kid_held_out=kernels[0],
            kid_training=kernels[1],
            kid_difference=kernels[2],
            good=good,
            variety=variety,
            precision=precision,
            recall=recall,
            frechet=self._frechet(features),
        )

    def _kernel_figures(
        self,
        features: Tensor,
        held_out: KernelReference | None,
        training: KernelReference | None,
    ) -> tuple[Figure | None, Figure | None, Figure | None]:
        known = [reference for reference in (held_out, training) if reference is not None]
        if len(features) < FEWEST or not known:
            return None, None, None
        result = compare_kernels(features, known)
        estimates = dict(zip(map(id, known), result.estimates, strict=True))

        def figure(reference: KernelReference | None, name: str) -> Figure | None:
            if reference is None:
                return None
            words = f"{len(reference.features):,} {name} images"
            return self._figure(estimates[id(reference)], len(features), KID, words)

        difference = None
        if held_out is not None and training is not None:
            difference = self._figure(
                result.difference(0, 1), len(features), f"{KID} to held-out less to training",
                f"{len(held_out.features):,} held-out and {len(training.features):,} "
                f"{self.name} images",
            )  # fmt: skip
        return figure(held_out, "held-out"), figure(training, self._training_name), difference

    @property
    def _training_name(self) -> str:
        compared = min(len(self.training), MAX_COMPARED)
        return self.name if compared == self.total else f"of {self.total:,} {self.name}"

    def _coverage(self, features: Tensor) -> tuple[Figure | None, Figure | None]:
        if self._real is None or len(features) < FEWEST:
            return None, None
        result = self._real.measure(features)
        words = f"{len(self._real.centres):,} {self._training_name} images"
        return (
            self._figure(result.good, len(features), "share that looks real", words),
            self._figure(result.variety, len(features), "share of the variety covered", words),
        )

    def _precision_recall(self, features: Tensor) -> tuple[Figure | None, Figure | None]:
        if self._manifold is None or len(features) <= MANIFOLD_NEIGHBOURS:
            return None, None
        real = self._manifold.centres
        words = {
            "extractor": self.network.name,
            "reference": f"{len(real):,} {self._training_name} images",
        }
        return (
            Figure.proportion(
                self._manifold.contains(features), metric="precision (k = 3)", **words
            ),
            Figure.proportion(Manifold(features).contains(real), metric="recall (k = 3)", **words),
        )

    def _frechet(self, features: Tensor) -> Figure | None:
        if len(features) < FRECHET_IMAGES_PER_DIMENSION * features.shape[1]:
            return None
        if self.statistics is None:
            return None
        estimate = frechet_interval_to(features, self.statistics.moments)
        return self._figure(estimate, len(features), FRECHET, self.statistics.name)

    @cached_property
    def statistics(self) -> ReferenceStatistics | None:
        """What the Fréchet distance compares with; None for too few training images."""
        fewest = FRECHET_IMAGES_PER_DIMENSION * self.training.shape[1]
        if self._statistics is not None or len(self.training) < fewest:
            return self._statistics
        name = f"{len(self.training):,} of {self.total:,} {self.name} images"
        return ReferenceStatistics(moments=Moments.of(self.training), name=name)

    def _figure(self, estimate: DistanceEstimate, n: int, metric: str, reference: str) -> Figure:
        return estimate.figure(n=n, metric=metric, extractor=self.network.name, reference=reference)


def dimensions(network: Features) -> int:
    """Return the number of features of an image."""
    with torch.no_grad():
        return network.pooled(torch.zeros(1, 3, 64, 64)).shape[1]


def real_features(
    dataset: Dataset,
    network: Features,
    positions: NDArray[np.int64],
    *,
    on_progress: Callable[[float], None] = lambda fraction: None,
) -> Tensor:
    """Return the features (n, d) of images of one shape, from the cache if it has them."""
    identity = _identity(dataset, network, positions)
    stored = load_array("features", identity) if dataset.config.cache == "auto" else None
    if stored is not None and len(stored) == len(positions):
        return torch.from_numpy(stored)
    parts = []
    for part in np.array_split(positions, len(positions) // READ_AT_ONCE + 1):
        if len(part):
            parts.append(pooled(network, to_float(dataset.images(part).pixels)).float())
            on_progress(sum(map(len, parts)) / len(positions))
    if not parts:
        return torch.zeros(0, 1)
    features = torch.cat(parts)
    if dataset.config.cache == "auto":
        save_array("features", identity, features.numpy())
    return features


def _identity(dataset: Dataset, network: Features, positions: NDArray[np.int64]) -> str:
    """Return a hash of the images and of the network's weights."""
    result = hashlib.sha256(f"1 {network.name} {dataset.fingerprint}".encode())
    result.update(positions.tobytes())
    for name, tensor in sorted(cast(nn.Module, network).state_dict().items()):
        result.update(name.encode())
        result.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return result.hexdigest()
