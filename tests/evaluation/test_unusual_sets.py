"""Evaluation of sets with images without a category, images that are not square, and categories
that were never trained.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.conditioners import ConditioningInfo
from sfumato.contexts import enumerate_values
from sfumato.data import DataConfig, Dataset, Folder, index
from sfumato.evaluation.classifier import train_classifier


def photos(root: Path, *, height: int, width: int) -> Path:
    """Twenty dark, twenty bright and twenty uncategorized images, which sort first."""
    rng = np.random.default_rng(0)
    lines = ["file_name,category"]
    for category, low in (("", 100), ("dark", 0), ("bright", 180)):
        for number in range(20):
            name = f"{low:03d}-{number:02d}.png" if category else f"0-{number:02d}.png"
            pixels = rng.integers(low, low + 60, (height, width), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name)
            lines.append(f"{name},{category}")
    (root / "metadata.csv").write_text("\n".join(lines))
    return root


def opened(root: Path, **settings: object) -> Dataset:
    return index(DataConfig(source=Folder(str(root)), channels=1, **settings))


@pytest.mark.parametrize(("height", "width"), [(8, 16), (40, 20), (3, 9), (64, 8)])
def test_a_classifier_learns_from_images_that_are_not_square(
    tmp_path: Path, height: int, width: int
) -> None:
    dataset = opened(photos(tmp_path, height=height, width=width), size=(height, width))
    classifier = train_classifier(dataset, dataset.training, steps=100)
    assert classifier.held_out_accuracy == 1.0


def test_categories_without_training_images_are_not_enumerated() -> None:
    info = ConditioningInfo(channels=1, categories=("a", "b", "c"), untrained=("b",))
    batch = enumerate_values(["category"], 5, info)
    assert batch["category"].tolist() == [0, 2, 0, 2, 0]
