"""What samples are judged by: features of real images, and a classifier that was trained on
them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.data import Dataset, to_float
from sfumato.evaluation.classifier import train_classifier
from sfumato.evaluation.extractors import extractor, pooled


class Judge:
    """Of one data set; images are (N, 3, H, W) in [-1, 1].

    Attributes:
        reference: features of about `most` training images, evenly chosen.
    """

    def __init__(self, dataset: Dataset, *, most: int) -> None:
        self.features, self.categories = extractor("auto"), len(dataset.categories)
        self.classifier = train_classifier(dataset, dataset.training)
        spread = dataset.training[:: max(1, len(dataset.training) // most)]
        self.reference = self.read(to_float(dataset.images(spread)[0]))

    def read(self, images: Tensor) -> Tensor:
        """Features, (N, D)."""
        return pooled(self.features, images)

    def category_accuracy(self, images: Tensor) -> float:
        """The share that the classifier reads as what was asked for: the categories in turn."""
        labels = torch.arange(len(images)) % self.categories
        return float((self.classifier.predict(images)[0] == labels).double().mean())
