"""Copies are found, and images that are merely good are not taken for them."""

from itertools import pairwise

import pytest
import torch

from sfumato.data import DataConfig, Digits, index, to_float
from sfumato.evaluation.memorization import nearest


@pytest.fixture(scope="module")
def real() -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out digits."""
    digits = index(DataConfig(source=Digits(), resolution=8, channels=1, holdout=0.15))
    return to_float(digits.images(digits.training)[0]), to_float(digits.images(digits.holdout)[0])


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_neighbours_are_those_of_brute_force() -> None:
    images, training = noise(20, 3, 4, 4), noise(150, 3, 4, 4, seed=1)
    found = nearest(images, training)
    distances = (images[:, None] - training[None]).double().square().flatten(2).sum(-1).sqrt()
    ordered, order = distances.sort(1)
    torch.testing.assert_close(found.first.double(), ordered[:, 0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found.second.double(), ordered[:, 1], rtol=1e-5, atol=0)
    assert torch.equal(found.index, order[:, 0])


@pytest.mark.parametrize("chunk", [1, 7, 50, 149, 150, 1000])
def test_chunks_change_nothing(chunk: int) -> None:
    images, training = noise(20, 1, 4, 4), noise(150, 1, 4, 4, seed=1)
    whole, parts = nearest(images, training), nearest(images, training, chunk=chunk)
    torch.testing.assert_close(parts.first, whole.first)
    torch.testing.assert_close(parts.second, whole.second)
    assert torch.equal(parts.index, whole.index)


def test_no_more_distances_are_held_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    measure = torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda a, b: seen.append(len(b)) or measure(a, b))
    nearest(noise(5, 1, 2, 2), noise(100, 1, 2, 2), chunk=30)
    assert seen == [30, 30, 30, 10]


def test_the_order_of_the_training_images_does_not_matter() -> None:
    images, training = noise(20, 1, 4, 4), noise(150, 1, 4, 4, seed=1)
    forwards, backwards = nearest(images, training), nearest(images, training.flip(0))
    torch.testing.assert_close(forwards.first, backwards.first)
    assert torch.equal(forwards.index, 149 - backwards.index)


def test_a_copycat_is_flagged_and_held_out_images_are_not(
    real: tuple[torch.Tensor, torch.Tensor],
) -> None:
    training, held_out = real
    copycat = training[:300] + 0.02 * noise(300, 1, 8, 8)
    assert nearest(copycat, training).copies > 0.98
    assert torch.equal(nearest(copycat, training).index, torch.arange(300))
    assert nearest(held_out, training).copies < 0.01


def test_the_more_noise_the_fewer_copies(real: tuple[torch.Tensor, torch.Tensor]) -> None:
    training, _ = real
    shares = [
        nearest(training[:300] + size * noise(300, 1, 8, 8), training).copies
        for size in (0.02, 0.1, 0.2, 1.0)
    ]
    assert all(more >= fewer for more, fewer in pairwise(shares))
    assert shares[-1] < 0.02


def test_the_threshold_is_a_third() -> None:
    training = torch.tensor([0.0, 4.0]).view(2, 1, 1, 1)
    images = torch.tensor([0.99, 1.01, 2.0, 3.1]).view(4, 1, 1, 1)  # d1/d2 = 0.329, 0.338, 1, 0.29
    found = nearest(images, training)
    assert (found.first < found.second / 3).tolist() == [True, False, False, True]
    assert found.copies == 0.5


def test_a_copy_of_a_image_that_stands_twice_is_a_copy(
    real: tuple[torch.Tensor, torch.Tensor],
) -> None:
    training = real[0][:200]
    twice = torch.cat([training, training])
    copycat = training + 0.02 * noise(200, 1, 8, 8)
    assert nearest(copycat, twice, chunk=64).copies == nearest(copycat, training).copies > 0.98
    assert torch.equal(nearest(copycat, twice).index, torch.arange(200))


def test_with_one_training_image_nothing_can_be_told() -> None:
    found = nearest(torch.zeros(2, 1, 2, 2) + 1e-3, torch.zeros(1, 1, 2, 2))
    assert found.copies == 0
    assert found.index.tolist() == [0, 0]
