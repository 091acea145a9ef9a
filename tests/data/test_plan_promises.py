"""The promises R1, R2 and R7: nothing dropped or repeated, the same for any number of ranks,
workers and resumptions, no batch shrinks.

Ranks are simulated: rank r of W asks the plan for its slice, which is all that a rank does.
"""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato import randomness, recipes, runs
from sfumato.conditioners import CategoryConfig
from sfumato.contexts import ContextConfig
from sfumato.data import (
    AugmentConfig,
    Batch,
    BatchPlan,
    BucketConfig,
    DataConfig,
    Dataset,
    Digits,
    Folder,
    batches,
    index,
)
from sfumato.data import batch_plan as planning
from sfumato.errors import DataError
from sfumato.networks import UNetConfig
from sfumato.training import Budget, LogConfig, PreviewConfig, ValidationConfig, supply
from tests.helpers.image_bytes import encode, noise

RANKS = (1, 2, 64)
SIZES = [(16, 16)] * 11 + [(24, 12)] * 8 + [(12, 24)] * 7
TINY = UNetConfig(
    channels=32, multipliers=(1, 1), blocks=1, attention_depths=(1,), head_channels=32
)


def planned(
    shapes: list[int], batch_size: int, *, seed: int = 0, version: int = planning.NEWEST
) -> BatchPlan:
    return BatchPlan(
        seed=seed, shapes=np.array(shapes, np.int64), batch_size=batch_size, version=version
    )


def gathered(plan: BatchPlan, step: int, ranks: int) -> list[int]:
    """What all ranks together train on at a step, in the order of the global batch."""
    return [int(i) for rank in range(ranks) for i in plan.batch(step, rank=rank, ranks=ranks)]


def epochs(plan: BatchPlan, ranks: int, count: int) -> list[list[int]]:
    """The samples of the first epochs, an epoch each."""
    steps = -(-count * plan.size // plan.batch_size)
    seen = [i for step in range(steps) for i in gathered(plan, step, ranks)]
    return [seen[epoch * plan.size : (epoch + 1) * plan.size] for epoch in range(count)]


def once_each(plan: BatchPlan, ranks: int, *, count: int = 3) -> bool:
    return all(sorted(seen) == list(range(plan.size)) for seen in epochs(plan, ranks, count))


# --- the plan -------------------------------------------------------------------------------------

sets = st.lists(st.integers(0, 4), min_size=1, max_size=90)  # shapes of up to 90 images
steps = st.integers(0, 400)
versions = st.sampled_from(sorted(planning.ORDERS))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("size", [1, 5, 63, 64, 65, 200])
def test_every_sample_comes_once_an_epoch_over_all_ranks(size: int, ranks: int) -> None:
    assert once_each(planned([0] * size, 64), ranks)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("counts", [(40, 30, 7), (1, 1, 1), (64, 64), (65, 1, 130)])
def test_every_sample_comes_once_an_epoch_with_several_shapes(
    counts: tuple[int, ...], ranks: int
) -> None:
    assert once_each(
        planned([shape for shape, count in enumerate(counts) for _ in range(count)], 64), ranks
    )


@settings(max_examples=60, deadline=None)
@given(
    shapes=sets,
    share=st.integers(1, 6),
    ranks=st.integers(1, 8),
    seed=st.integers(0, 2**32),
    version=versions,
    most=st.sampled_from([0, randomness.MOST_PERMUTED]),
)
def test_every_sample_comes_once_an_epoch_whatever_the_set_and_the_batch(
    shapes: list[int], share: int, ranks: int, seed: int, version: int, most: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(randomness, "MOST_PERMUTED", most)  # 0: bijections of small sets too
        assert once_each(planned(shapes, share * ranks, seed=seed, version=version), ranks)


@settings(max_examples=60, deadline=None)
@given(shapes=sets, step=steps, seed=st.integers(0, 2**32), version=versions)
def test_the_union_over_ranks_does_not_depend_on_their_number(
    shapes: list[int], step: int, seed: int, version: int
) -> None:
    plan = planned(shapes, 64, seed=seed, version=version)
    assert gathered(plan, step, 1) == gathered(plan, step, 2) == gathered(plan, step, 64)


@pytest.mark.parametrize("ranks", RANKS)
def test_no_two_ranks_share_a_sample_of_a_batch_and_none_gets_less(ranks: int) -> None:
    plan = planned([0] * 100 + [1] * 60, 64)
    # wholly inside the first epoch
    parts = [plan.batch(1, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert {len(part) for part in parts} == {64 // ranks}
    assert len(set(np.concatenate(parts))) == 64


@settings(max_examples=60, deadline=None)
@given(shapes=sets, batch_size=st.integers(1, 40), wanted=st.lists(steps, min_size=2, max_size=6))
def test_a_batch_does_not_depend_on_which_were_asked_for_before(
    shapes: list[int], batch_size: int, wanted: list[int]
) -> None:
    used = planned(shapes, batch_size)
    after_others = [used.batch(step).tolist() for step in wanted]
    assert after_others == [planned(shapes, batch_size).batch(step).tolist() for step in wanted]


def test_a_batch_far_ahead_costs_two_epochs_orders_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def permutation(seed: int, purpose: str, *, index: int, size: int) -> np.ndarray:
        asked.append(index)
        return original(seed, purpose, index=index, size=size)

    original = randomness.permutation
    monkeypatch.setattr(planning.randomness, "permutation", permutation)
    plan = planned([0] * 70 + [1] * 31, 16)
    plan.batch(10**9)
    assert set(asked) <= {10**9 * 16 // 101, (10**9 * 16 + 15) // 101}
    assert asked


def test_batches_of_several_shapes_are_few() -> None:
    """At most what is left over of each shape at an epoch's end, and what completes its last
    batch.
    """
    plan = planned([0] * 503 + [1] * 311 + [2] * 190, 16)
    steps_of = [range(epoch * plan.size // 16, (epoch + 1) * plan.size // 16) for epoch in range(5)]
    mixed = [
        sum(len(set(plan.shapes[plan.batch(step)])) > 1 for step in steps) for steps in steps_of
    ]
    assert max(mixed) <= 4


def test_the_hash_tells_plans_apart_that_give_other_batches() -> None:
    shapes = [0] * 9 + [1] * 4
    same = planned(shapes, 4, seed=3)
    others = [
        planned(shapes, 4, seed=4),
        planned(shapes, 5, seed=3),
        planned(shapes[::-1], 4, seed=3),
        planned([0] * 13, 4, seed=3),
    ]
    assert planned(list(shapes), 4, seed=3).hash == same.hash
    assert len({plan.hash for plan in (same, *others)}) == 5


# --- the batches ----------------------------------------------------------------------------------


def fill(root: Path, sizes: list[tuple[int, int]] = SIZES) -> Path:
    """Images of these (width, height), every second one of another category."""
    for number, (width, height) in enumerate(sizes):
        path = root / "ab"[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(noise(height, width, seed=number)))
    return root


def mixed(root: Path, **options) -> DataConfig:
    """Images of several shapes, decoded as they are used."""
    return DataConfig(
        source=Folder(str(root)),
        resolution=16,
        buckets=BucketConfig(count=5, step=4),
        holdout=0.2,
        cache="off",
        memory_gib=0.0,
        **options,
    )


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return fill(tmp_path / "images")


def plan_of(dataset: Dataset, batch_size: int) -> BatchPlan:
    return BatchPlan(seed=1, shapes=dataset.shapes[dataset.training], batch_size=batch_size)


def contents(batch: Batch) -> list[tuple[int, bytes, bytes, bytes]]:
    return [
        (
            group.first,
            *(
                t.numpy().tobytes()
                for t in (group.images, group.context["category"], group.context["augmentation"])
            ),
        )
        for group in batch.groups
    ]


def some(dataset: Dataset, batch_size: int, *, start: int = 0, count: int = 8) -> list[list[tuple]]:
    return [
        contents(batch)
        for batch in islice(batches(dataset, plan_of(dataset, batch_size), start=start), count)
    ]


CHANGED = AugmentConfig(flip="horizontal", rotation_degrees=10, karras=0.3)


@pytest.mark.parametrize("batch_size", [4, 5, 40])
def test_resuming_in_mid_epoch_goes_on_as_if_never_stopped(images: Path, batch_size: int) -> None:
    whole = some(index(mixed(images, augment=CHANGED)), batch_size)
    for stopped in (1, 5):
        again = index(mixed(images, augment=CHANGED))  # as a new process would
        assert some(again, batch_size, start=stopped, count=8 - stopped) == whole[stopped:]
        assert some(again, batch_size, start=stopped + 1, count=8 - stopped) != whole[stopped:]


def test_two_workers_resume_where_none_stopped(images: Path) -> None:
    dataset = index(mixed(images, augment=CHANGED))
    with_two = replace(dataset, config=replace(dataset.config, workers=2))
    assert some(with_two, 6, start=3, count=4) == some(dataset, 6, start=3, count=4)


@pytest.mark.parametrize("batch_size", [5, 8, 64])
def test_parts_have_one_shape_follow_one_another_and_fill_the_batch(
    images: Path, batch_size: int
) -> None:
    dataset = index(mixed(images))
    number, several = 0, 0
    for batch in islice(
        batches(dataset, plan_of(dataset, batch_size), start=0), 2 * len(SIZES) // batch_size + 1
    ):
        assert len(batch) == batch_size
        several += len(batch.groups) > 1
        for group in batch.groups:
            assert group.first == number
            assert group.images.ndim == 4
            assert (
                len(group.images)
                == len(group.context["category"])
                == len(group.context["augmentation"])
                == len(group)
            )
            number += len(group)
    assert several > 0


def test_a_samples_change_belongs_to_its_number_not_to_its_batch() -> None:
    dataset = index(DataConfig(source=Digits(), resolution=8, channels=1, augment=CHANGED))
    small, large = (
        torch.cat(
            [
                p.images
                for b in islice(batches(dataset, plan_of(dataset, size), start=0), 60 // size)
                for p in b.groups
            ]
        )
        for size in (5, 20)
    )
    assert torch.equal(small, large)


# --- bad samples ----------------------------------------------------------------------------------


def lose(dataset: Dataset, root: Path, positions: list[int]) -> set[str]:
    """Empty the files at `positions`; returns their names."""
    names = {dataset.entries[position].name for position in positions}
    for name in names:
        (root / name).write_bytes(b"")
    return names


def test_a_lost_image_is_replaced_by_one_of_its_shape_and_no_batch_shrinks(images: Path) -> None:
    dataset = index(mixed(images))
    before = list(islice(batches(dataset, plan_of(dataset, 7), start=0), 6))
    names = lose(dataset, images, [int(i) for i in dataset.training[::6]])
    after = list(islice(batches(dataset, plan_of(dataset, 7), start=0), 6))
    again = list(islice(batches(dataset, plan_of(dataset, 7), start=0), 6))
    shapes = [[group.images.shape for group in batch.groups] for batch in before]
    assert [[group.images.shape for group in batch.groups] for batch in after] == shapes
    assert [contents(batch) for batch in after] == [contents(batch) for batch in again]
    assert [contents(batch) for batch in after] != [contents(batch) for batch in before]
    reported = [(bad.name, bad.reason) for batch in after for bad in batch.bad]
    assert {name for name, _ in reported} == names
    assert {reason for _, reason in reported} == {"empty file"}


def test_a_lost_image_is_never_replaced_by_a_held_out_one(images: Path) -> None:
    dataset = index(mixed(images))
    kept = {dataset.images([position])[0].numpy().tobytes() for position in dataset.holdout}
    names = lose(dataset, images, [int(i) for i in dataset.training[::4]])
    for position in dataset.training:
        if dataset.entries[position].name in names:
            assert dataset.images([position])[0].numpy().tobytes() not in kept


def run_on(dataset_config: DataConfig) -> recipes.Run:
    return recipes.Run(
        name="tiny",
        data=dataset_config,
        network=TINY,
        conditioner=ContextConfig(category=CategoryConfig(size=8)),
        batch_size=12,
        precision="float32",
        budget=Budget(steps=3),
        log=LogConfig(every_steps=1),
        validation=ValidationConfig(every_steps=9, samples=4, copy_samples=0),
        preview=PreviewConfig(every_steps=9, num=1),
    )


def while_training(monkeypatch: pytest.MonkeyPatch, action) -> None:
    """Do something after indexing, before the first batch is read."""
    original = supply.batches

    def disturbed(dataset: Dataset, plan: BatchPlan, **options):
        action(dataset)
        return original(dataset, plan, **options)

    monkeypatch.setattr(supply, "batches", disturbed)


def test_lost_images_are_listed_with_the_reason_and_training_goes_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: set[str] = set()
    while_training(
        monkeypatch, lambda dataset: lost.update(lose(dataset, images, [int(dataset.training[2])]))
    )
    path = runs.train(run_on(mixed(images)), run=tmp_path / "run")
    listed = [json.loads(line) for line in (path / "bad_samples.jsonl").read_text().splitlines()]
    assert {line["file"] for line in listed} == lost
    assert {line["reason"] for line in listed} == {"empty file"}
    assert json.loads((path / "status.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_the_same_image_lost_again_and_again_is_one(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    while_training(monkeypatch, lambda dataset: lose(dataset, images, [int(dataset.training[2])]))
    settings = replace(run_on(mixed(images)), budget=Budget(epochs=25), batch_size=24)
    path = runs.train(settings, run=tmp_path / "run")
    listed = (path / "bad_samples.jsonl").read_text().splitlines()
    assert len(listed) > 20  # more than the fewest that stop a run
    assert json.loads((path / "status.json").read_text())["state"] == "finished"


def test_over_a_set_share_of_lost_images_the_run_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = fill(tmp_path / "images", [(16, 16)] * 60)

    def all_but_one_of_each_category(dataset: Dataset) -> None:
        kept = {
            int(np.flatnonzero(dataset.labels[dataset.training] == label)[0]) for label in (0, 1)
        }
        lose(dataset, root, [int(i) for row, i in enumerate(dataset.training) if row not in kept])

    while_training(monkeypatch, all_but_one_of_each_category)
    with pytest.raises(
        DataError, match=r"images could not be read any more, e\.g\. .*: empty file"
    ):
        runs.train(run_on(mixed(root)), run=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
