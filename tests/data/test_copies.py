"""Planted copies of training images are found among all of them, and unseen images are not taken
for copies.
"""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.data import BucketConfig, DataConfig, Dataset, Digits, Folder, copies, index, to_float
from sfumato.data.copies import NO_COPY, CopyIndex
from sfumato.data.duplicates import clusters
from sfumato.data.thumbnails import thumbnail
from tests.helpers.image_bytes import encode
from tests.helpers.image_sets import (
    CHANGES,
    dataset_of,
    encoded_again,
    noisy,
    photographs,
)

LEARNED, UNSEEN, PLANTED = 600, 300, 100


@pytest.fixture(scope="module")
def learned() -> Dataset:
    return dataset_of(photographs(LEARNED))


@pytest.fixture(scope="module")
def found_in(learned: Dataset) -> CopyIndex:
    return CopyIndex.of(learned)


def originals(dataset: Dataset, count: int = PLANTED) -> tuple[np.ndarray, torch.Tensor]:
    """Positions of training images, evenly chosen, and the images."""
    positions = dataset.training[:: len(dataset.training) // count][:count]
    return positions, to_float(dataset.images(positions).pixels)


@pytest.mark.parametrize("change", CHANGES)
def test_copies_are_found_however_they_are_changed(
    learned: Dataset, found_in: CopyIndex, change: str
) -> None:
    positions, images = originals(learned)
    found = found_in.find(CHANGES[change](images))
    assert (found == positions).mean() >= (0.85 if change.startswith("zoomed") else 0.95)


def test_unseen_images_are_no_copies(found_in: CopyIndex) -> None:
    unseen = to_float(torch.from_numpy(photographs(UNSEEN, seed=1)))
    assert (found_in.find(unseen) != NO_COPY).mean() < 0.01


ORIGINALS, SIBLINGS = 30, 12


@pytest.fixture(scope="module")
def with_siblings() -> Dataset:
    """200 images, of which 30 stand there as twelve JPEG files too."""
    pixels = photographs(200)
    siblings = [encoded_again(pixels[:ORIGINALS], 86 + number) for number in range(SIBLINGS)]
    everything = np.concatenate([pixels, *siblings])
    small = np.stack([thumbnail(image) for image in everything])
    groups = clusters([str(i) for i in range(len(everything))], small.__getitem__, resolution=32)
    assert np.bincount(groups).max() == 1 + SIBLINGS
    return dataset_of(everything, groups=groups)


@pytest.mark.parametrize("change", ["exact", "noise 0.1", "mirrored"])
def test_siblings_in_the_training_set_do_not_hide_a_copy(
    with_siblings: Dataset, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "CANDIDATES", SIBLINGS // 2)
    positions = np.arange(ORIGINALS)
    images = to_float(with_siblings.images(positions).pixels)
    found = CopyIndex.of(with_siblings).find(CHANGES[change](images))
    original = np.where(found < 200, found, (found - 200) % ORIGINALS)
    assert (original == positions).mean() >= 0.95


def test_a_crowd_of_look_alikes_does_not_hide_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred images of one group lie nearer to the changed copy than its original does."""
    pixels = photographs(100)
    image = to_float(torch.from_numpy(pixels[:1]))
    crowd = noisy(image.repeat(100, 1, 1, 1), 0.02)
    crowd[:, :, 12:20, 12:20] = -image[:, :, 12:20, 12:20]  # another thing in the middle
    crowd = ((crowd + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    groups = np.concatenate([np.arange(100), np.full(100, 100)])
    dataset = dataset_of(np.concatenate([pixels, crowd]), groups=groups)
    monkeypatch.setattr(copies, "CANDIDATES", 4)
    half = image.clone()
    half[:, :, 12:20, 12:14] = -image[:, :, 12:20, 12:14]
    index_ = CopyIndex.of(dataset)
    near = index_.neighbours(half)
    assert near.positions[0] in (0, *range(100, 200))
    assert index_.find(image)[0] == 0


def test_the_size_of_chunks_changes_nothing(
    learned: Dataset, found_in: CopyIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, images = originals(learned, 40)
    queries = torch.cat([noisy(images, 0.1), to_float(torch.from_numpy(photographs(20, seed=2)))])
    whole, near = found_in.find(queries), found_in.neighbours(queries)
    monkeypatch.setattr(copies, "BYTES_READ_AT_ONCE", 3 * 32 * 32 * 37)
    monkeypatch.setattr(copies, "COMPARED_AT_ONCE", 41)
    monkeypatch.setattr("sfumato.data.duplicates.PAIRS_AT_ONCE", 7)
    parts = CopyIndex.of(learned)
    assert np.array_equal(parts.thumbnails, found_in.thumbnails)
    assert np.array_equal(parts.find(queries), whole)
    assert np.array_equal(parts.neighbours(queries).positions, near.positions)
    assert np.allclose(parts.neighbours(queries).first, near.first, atol=1e-5)
    assert np.allclose(parts.neighbours(queries).scale, near.scale, atol=1e-5)
    one_by_one = np.concatenate([found_in.find(query[None]) for query in queries])
    assert np.array_equal(one_by_one, whole)


def test_neighbours_are_those_of_brute_force(learned: Dataset, found_in: CopyIndex) -> None:
    def flat(images: np.ndarray) -> np.ndarray:
        means = images.reshape(len(images), 3, 8, 4, 8, 4).mean((3, 5)).reshape(len(images), -1)
        return (means - means.mean(1, keepdims=True)) / means.std(1, keepdims=True)

    queries = photographs(30, seed=3)
    training = flat(learned.images(learned.training).pixels.numpy())
    distances = np.minimum(
        *(
            np.linalg.norm(flat(images)[:, None] - training, axis=2)
            for images in (queries, queries[:, :, :, ::-1])
        )
    )
    near = found_in.neighbours(to_float(torch.from_numpy(queries)))
    assert np.array_equal(near.positions, distances.argmin(1))
    assert np.allclose(near.first, distances.min(1), rtol=1e-4)
    assert np.allclose(near.scale, np.sort(distances, axis=1)[:, copies.SCALE_OF - 1], rtol=1e-4)


def test_a_training_image_is_not_compared_with_its_own_group(learned: Dataset) -> None:
    index_ = CopyIndex.of(learned)
    positions, images = originals(learned)
    assert (index_.find(images) == positions).all()
    alone = index_.find(images, groups=learned.clusters[positions])
    assert (alone != NO_COPY).mean() < 0.01
    assert (index_.neighbours(images).first == 0).all()
    assert (index_.neighbours(images, groups=learned.clusters[positions]).first > 1).all()


def test_gray_transparent_and_16_bit_images(learned: Dataset) -> None:
    pixels = learned.images(learned.training[:60]).pixels.numpy()
    gray = pixels.mean(1, keepdims=True).round().astype(np.uint8)
    alpha = np.concatenate([pixels, np.full_like(gray, 255)], axis=1)
    # a dim set, as microscopes make them: 16 bits of which a tenth is used
    dim = (gray.astype(np.uint16) * 25).astype(np.uint16)
    for each in (gray, alpha, dim):
        dataset = dataset_of(each)
        images = to_float(torch.from_numpy(each))
        found = CopyIndex.of(dataset).find(images.flip(3))
        assert np.array_equal(found, dataset.training)


def test_images_of_several_shapes_and_cached_thumbnails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, image in enumerate(photographs(24, side=64)):
        shown = Image.fromarray(image.transpose(1, 2, 0))
        shown = shown if number % 2 else shown.resize((96, 64))
        (tmp_path / f"{number:02d}.png").write_bytes(encode(shown))
    settings = {"source": Folder(str(tmp_path)), "resolution": 32, "buckets": BucketConfig()}
    results = []
    for cache in ("auto", "off"):
        dataset = index(DataConfig(**settings, cache=cache))
        assert (dataset.read_thumbnails is None) == (cache == "off")
        assert len(set(dataset.shapes)) > 1
        searched = CopyIndex.of(dataset)
        results.append(searched.thumbnails)
        for position in dataset.training:
            image = to_float(dataset.images([position]).pixels)
            assert searched.find(image).tolist() == [position]
    assert np.array_equal(*results)


def test_a_diverged_model_makes_no_copies(found_in: CopyIndex) -> None:
    nothing = torch.full((3, 3, 32, 32), torch.nan)
    nothing[1], nothing[2] = torch.inf, -torch.inf
    assert found_in.find(nothing).tolist() == [NO_COPY] * 3


def test_a_set_of_two_images() -> None:
    dataset = dataset_of(photographs(2))
    images = to_float(dataset.images(dataset.training).pixels)
    for positions in (dataset.training, dataset.training[:1]):
        searched = CopyIndex.of(dataset, positions)
        found = searched.find(images)
        assert found.tolist() == [0, 1 if len(positions) == 2 else NO_COPY]
        assert searched.find(images[:1], groups=dataset.clusters[:1]).tolist() == [NO_COPY]


DIGITS = index(DataConfig(source=Digits(), resolution=8, channels=1, cache="off"))


@pytest.mark.parametrize("count", [60, 240, 1597])
def test_digits_are_too_small_for_near_duplicates_and_are_compared_by_distance(count: int) -> None:
    digits = DIGITS
    searched = CopyIndex.of(digits, digits.training[:count])
    assert "near-duplicates cannot be told" in searched.rule
    unseen = np.concatenate([digits.holdout, digits.training[count:][:400]])
    assert (searched.find(to_float(digits.images(unseen).pixels)) != NO_COPY).mean() < 0.01
    images = to_float(digits.images(digits.training[:60]).pixels)
    for change in ("exact", "noise 0.1", "mirrored", "contrast 0.7", "brighter"):
        found = searched.find(CHANGES[change](images))
        assert (found == digits.training[:60]).mean() >= 0.95, change


def test_siblings_do_not_hide_a_copy_of_a_digit() -> None:
    pixels = DIGITS.images(DIGITS.training[:300]).pixels
    shifted = (pixels[:60].int() + 3).clamp(0, 255).byte()
    dataset = dataset_of(torch.cat([pixels, shifted]).numpy())
    found = CopyIndex.of(dataset).find(noisy(to_float(pixels[:60]), 0.05))
    assert np.isin(found % 300, np.arange(60)).all()
    assert (found % 300 == np.arange(60)).mean() > 0.95


@pytest.mark.slow
def test_a_copy_of_image_45000_of_50000_is_found_in_less_than_a_gibibyte() -> None:
    pixels = photographs(50_000)
    dataset = dataset_of(pixels)
    tracemalloc.start()
    searched = CopyIndex.of(dataset)
    queries = to_float(torch.from_numpy(photographs(200, seed=1)))
    queries[7] = noisy(to_float(torch.from_numpy(pixels[45_000]))[None], 0.1)[0].flip(2)
    found = searched.find(queries)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found[7] == 45_000
    assert (np.delete(found, 7) != NO_COPY).mean() < 0.01
    assert peak < 2**30
