"""Evaluation of sets with images without a category, images that are not square, categories that
were never trained, and more images than are compared.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sfumato.conditioners import ConditioningInfo
from sfumato.contexts import enumerate_values
from sfumato.data import DataConfig, Dataset, Folder, index
from sfumato.evaluation import quality
from sfumato.evaluation.classifier import train_classifier
from sfumato.evaluation.fidelity import choose_conditions, choose_reference
from sfumato.networks.perceptual import RandomFeatures
from sfumato.training import copy_search
from sfumato.training.copy_search import CopyCounter
from tests.helpers.image_sets import dataset_of, photographs


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


SHOWN = 8  # of forty images of each part


def listed_by_category(pixels: np.ndarray) -> Dataset:
    """Forty training images and forty held-out ones, ten of each of four categories in turn."""
    labels = np.arange(80) % 40 // 10
    return dataset_of(pixels[:40], pixels[40:], labels=labels.tolist(), categories=tuple("abcd"))


def test_of_many_real_images_those_of_all_categories_are_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quality, "MAX_COMPARED", SHOWN)
    kinds = photographs(4)[np.arange(80) % 40 // 10]  # one image for each category
    dataset = listed_by_category(kinds)
    meter = quality.QualityMeter(
        dataset, RandomFeatures(), training=dataset.training, held_out=dataset.holdout
    )
    for features in (meter.training, meter.held_out):
        assert len(features) == SHOWN
        assert len(features.unique(dim=0)) == 4


def test_of_many_held_out_conditions_those_of_all_categories_are_sampled() -> None:
    dataset = listed_by_category(photographs(80))
    conditioner = SimpleNamespace(training_context=lambda images, context, seed, first: context)
    pipeline = SimpleNamespace(
        reads=("category", "text"),
        info=ConditioningInfo(channels=3, categories=dataset.categories),
        model=SimpleNamespace(conditioner=conditioner),
    )
    reference = choose_reference(dataset, pipeline.reads)
    conditions = choose_conditions(pipeline, dataset, reference, SHOWN)
    assert conditions.labels.bincount().tolist() == [2, 2, 2, 2]


def test_copies_among_real_images_are_counted_in_all_categories(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(copy_search, "MAX_REAL", SHOWN)
    pixels = photographs(80)
    pixels[70:] = pixels[30:40]  # the held-out images of the last category are copies
    counter = CopyCounter(listed_by_category(pixels))
    found = counter.beside_real(np.zeros(3, bool))
    assert (found.real_count, found.real) == (2, 2 * SHOWN)
