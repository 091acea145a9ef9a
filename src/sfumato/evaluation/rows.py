"""What an evaluation of fidelity consists of: rows of figures, one for each set of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sfumato.evaluation.figures import Figure
from sfumato.evaluation.memorization import Memorization
from sfumato.evaluation.quality import Quality
from sfumato.evaluation.statistics import ReferenceStatistics


@dataclass(frozen=True, kw_only=True, eq=False)
class FidelityRow:
    """Figures of one set of images: samples at a guidance scale, or real images.

    Attributes:
        quality: how good they are as a set; None without images.
        memorization: how near they are to training images.
        category_accuracy: proportion that the classifier assigns to the requested category, or of
            real images to their own; None where none was requested.
    """

    name: str
    n: int
    quality: Quality | None
    memorization: Memorization
    category_accuracy: Figure | None

    def figures(self) -> dict[str, Figure | None]:
        """Return all figures by name."""
        return {
            **({} if self.quality is None else self.quality.figures()),
            "category_accuracy": self.category_accuracy,
            **self.memorization.figures(),
        }

    def plain(self) -> dict[str, Any]:
        """Return the row as plain data."""
        return {"name": self.name, "n": self.n, **_plain(self.figures())}


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Rows of figures: held-out real images, which a perfect model would reach; training images,
    which a model that copies would reach; and samples at each guidance scale.

    Attributes:
        extractor: name of the network in whose features images are compared.
        copy_rule: what counts as a copy.
        left_out: figures of training images that are compared with the others.
        sentences: what the figures say on copies and on quality.
        remarks: sentences on the reliability of the figures.
        compared_with: what the training images are called, if they are not those of the model.
        statistics: what the Fréchet distances compare with, where there are any.
    """

    extractor: str
    copy_rule: str
    rows: Sequence[FidelityRow]
    left_out: Memorization
    sentences: Sequence[str]
    remarks: Sequence[str]
    compared_with: str = "training"
    statistics: ReferenceStatistics | None = None

    def plain(self) -> dict[str, Any]:
        """Return the figures as plain data, for JSON."""
        return {
            "extractor": self.extractor,
            "copy_rule": self.copy_rule,
            "compared_with": self.compared_with,
            "sentences": list(self.sentences),
            "remarks": list(self.remarks),
            "rows": [row.plain() for row in self.rows],
            "left_out": _plain(self.left_out.figures()),
        }


def _plain(figures: Mapping[str, Figure | None]) -> dict[str, Any]:
    return {name: None if each is None else each.plain() for name, each in figures.items()}


class Reference(NamedTuple):
    """Positions of the real images that samples are compared with, all of the most common shape.

    They have a category if the model is conditioned on it.
    """

    training: NDArray[np.int64]
    held_out: NDArray[np.int64]
