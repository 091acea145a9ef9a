"""The figures of samples while a run trains are those of `sfumato evaluate`, as time allows."""

from __future__ import annotations

import pytest
import torch

from sfumato.data import Dataset, to_float
from sfumato.data.copies import CopyIndex
from sfumato.evaluation.extractors import extractor
from sfumato.evaluation.memorization import CopyMeter
from sfumato.evaluation.quality import QualityMeter
from sfumato.evaluation.sample_meter import SampleMeter
from tests.helpers.image_sets import dataset_of, photographs

DISTANCES = {"close", "nearest", "distance_test"}
QUALITY = {
    "kid_held_out",
    "kid_training",
    "kid_difference",
    "good",
    "variety",
    "precision",
    "recall",
}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return dataset_of(photographs(120), photographs(30, seed=1))


def learned(dataset: Dataset, count: int) -> torch.Tensor:
    return (to_float(dataset.images(dataset.training[:count]).pixels) + 1) / 2


def test_figures_are_those_of_an_evaluation(dataset: Dataset) -> None:
    index, images = CopyIndex.of(dataset), learned(dataset, 30)
    figures = SampleMeter(dataset).figures(images, index, left_s=1e9)
    assert figures.keys() == DISTANCES | QUALITY
    copies = CopyMeter(index).measure(images * 2 - 1).figures()
    quality = QualityMeter(
        dataset, extractor("auto"), training=dataset.training, held_out=dataset.holdout
    )
    known = {**copies, **quality.measure(images * 2 - 1).figures()}
    for name, figure in figures.items():
        assert figure == known[name].plain(), name


def test_a_copycat_is_nearer_to_training_images(dataset: Dataset) -> None:
    figures = SampleMeter(dataset).figures(learned(dataset, 60), CopyIndex.of(dataset), left_s=1e9)
    assert figures["distance_test"]["high"] < 0
    assert figures["close"]["value"] == 1
    assert figures["kid_difference"]["value"] > 0


def test_without_time_only_distances_are_measured(dataset: Dataset) -> None:
    meter, index = SampleMeter(dataset), CopyIndex.of(dataset)
    assert meter.figures(learned(dataset, 5), index, left_s=0).keys() == DISTANCES
    assert meter.figures(learned(dataset, 5), index, left_s=1e9).keys() == DISTANCES | QUALITY


def test_the_features_of_real_images_are_paid_once(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter, index = SampleMeter(dataset), CopyIndex.of(dataset)
    monkeypatch.setattr(SampleMeter, "_image_s", 1.0)  # a second for each image
    meter.figures(learned(dataset, 5), index, left_s=5 + len(dataset.training))
    assert "_quality" not in vars(meter)  # held-out images take seconds too
    meter.figures(learned(dataset, 5), index, left_s=1e9)
    assert meter.figures(learned(dataset, 5), index, left_s=8).keys() == DISTANCES | QUALITY
