"""Batches come in the plan's order, the same for any number of workers and from any start."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from sfumato.data import (
    AugmentConfig,
    Batch,
    BatchPlan,
    DataConfig,
    Dataset,
    Digits,
    Folder,
    ShapeGroup,
    batches,
    index,
    to_float,
)
from tests.helpers.image_bytes import encode, noise


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return index(DataConfig(source=Digits(), resolution=8, channels=1, holdout=0.15))


def folder(root: Path, **options) -> Dataset:
    for number in range(12):
        path = root / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(noise(6, 6, seed=number)))
    dataset = index(
        DataConfig(source=Folder(str(root)), resolution=6, cache="off", memory_gib=0.0, **options)
    )
    assert dataset.read_rows is None  # images are decoded as they are used
    return dataset


def some(dataset: Dataset, plan: BatchPlan, *, start: int = 0, count: int = 6) -> list[Batch]:
    return list(islice(batches(dataset, plan, start=start), count))


def planned(dataset: Dataset, *, seed: int, batch_size: int) -> BatchPlan:
    return BatchPlan(seed=seed, shapes=dataset.shapes[dataset.training], batch_size=batch_size)


def only(batch: Batch) -> ShapeGroup:
    """The one part of a batch whose images have one shape."""
    (group,) = batch.groups
    assert len(batch) == len(group) == len(group.images)
    return group


def same(a: object, b: object) -> bool:
    return (
        torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    )


def equal(a: list[Batch], b: list[Batch]) -> bool:
    return all(
        x.first == y.first
        and torch.equal(x.images, y.images)
        and x.context.keys() == y.context.keys()
        and all(same(x.context[name], y.context[name]) for name in x.context)
        for x, y in zip(map(only, a), map(only, b), strict=True)
    )


def test_batches_hold_the_plans_images_and_labels(digits: Dataset) -> None:
    plan = planned(digits, seed=1, batch_size=5)
    for step, batch in enumerate(some(digits, plan)):
        positions, group = digits.training[plan.batch(step)], only(batch)
        assert group.first == 5 * step
        assert torch.equal(group.images, to_float(torch.from_numpy(digits.read_rows(positions))))
        assert torch.equal(group.context["category"], digits.labels[torch.from_numpy(positions)])
        assert list(batch.bad) == []


def test_held_out_images_are_never_in_a_batch(digits: Dataset) -> None:
    plan = planned(digits, seed=1, batch_size=400)
    seen = {image.numpy().tobytes() for batch in some(digits, plan) for image in only(batch).images}
    held = {image.numpy().tobytes() for image in to_float(digits.images(digits.holdout)[0])}
    assert len(seen) == len(digits.training)
    assert not seen & held


def test_pixels_run_from_minus_one_to_one() -> None:
    assert to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx(
        [-1.0, -0.6, 1.0]
    )
    assert to_float(torch.tensor([255], dtype=torch.uint8)).dtype == torch.float32


def test_starting_at_k_is_skipping_k(digits: Dataset) -> None:
    plan = planned(digits, seed=2, batch_size=300)
    assert equal(some(digits, plan, count=9)[4:], some(digits, plan, start=4, count=5))
    assert not equal(some(digits, plan, count=5), some(digits, plan, start=1, count=5))


def test_two_workers_give_what_none_gives(tmp_path: Path) -> None:
    dataset = folder(tmp_path, augment=AugmentConfig(flip="horizontal"))
    plan = planned(dataset, seed=0, batch_size=4)
    (tmp_path / dataset.entries[dataset.training[0]].name).unlink()
    alone = some(dataset, plan, start=1, count=7)
    with_two = replace(dataset, config=replace(dataset.config, workers=2))
    together = some(with_two, plan, start=1, count=7)
    assert equal(alone, together)
    assert [batch.bad for batch in alone] == [batch.bad for batch in together]
    assert any(batch.bad for batch in together)


def test_a_lost_image_leaves_the_batch_whole(tmp_path: Path) -> None:
    dataset = folder(tmp_path)
    plan = planned(dataset, seed=0, batch_size=len(dataset.training))
    whole = some(dataset, plan, count=1)[0]
    name = dataset.entries[dataset.training[plan.batch(0)[2]]].name
    (tmp_path / name).write_bytes(b"")
    batch = some(dataset, plan, count=1)[0]
    before, after = only(whole).images, only(batch).images
    assert after.shape == before.shape
    assert [reject.name for reject in batch.bad] == [name]
    same = (after == before).flatten(1).all(1)
    assert same.tolist() == [row != 2 for row in range(len(same))]


def test_flips_are_about_half_keyed_by_sample_and_exact(digits: Dataset) -> None:
    flipping = replace(
        digits, config=replace(digits.config, augment=AugmentConfig(flip="horizontal"))
    )
    plan = planned(digits, seed=0, batch_size=500)
    pairs = list(zip(some(digits, plan), some(flipping, plan), strict=True))
    plain, flipped = (torch.cat([only(pair[which]).images for pair in pairs]) for which in (0, 1))
    mirrored = (flipped == plain.flip(-1)).flatten(1).all(1)
    kept = (flipped == plain).flatten(1).all(1)
    assert (mirrored | kept).all()
    assert 0.46 < mirrored.double().mean() < 0.54  # of 3000
    small = planned(digits, seed=0, batch_size=60)
    assert torch.equal(
        torch.cat([only(batch).images for batch in some(flipping, small, count=50)]), flipped
    )
    other = planned(digits, seed=1, batch_size=500)
    pairs = list(zip(some(digits, other), some(flipping, other), strict=True))
    again = torch.cat([(only(a).images != only(b).images).flatten(1).any(1) for a, b in pairs])
    # another seed tosses other coins
    assert 0.4 < (again == (mirrored & ~kept)).double().mean() < 0.6


def test_without_flip_nothing_is_mirrored(digits: Dataset) -> None:
    plan = planned(digits, seed=0, batch_size=len(digits.training))
    seen = only(some(digits, plan, count=1)[0]).images
    assert torch.equal(seen, to_float(digits.images(digits.training[plan.batch(0)])[0]))
