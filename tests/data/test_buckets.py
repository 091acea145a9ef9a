"""Tall and wide images keep about their shape: the shapes are fair, images go to the nearest, and
training sees each of them once.
"""

import json
import math
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sfumato import recipes, runs
from sfumato.conditioners import CategoryConfig
from sfumato.contexts import ContextConfig
from sfumato.data import (
    AugmentConfig,
    BatchPlan,
    BucketConfig,
    DataConfig,
    Dataset,
    Folder,
    batches,
    index,
)
from sfumato.data.decoding import PixelFormat, decode
from sfumato.errors import ConfigError
from sfumato.generation.diffusion_model import SamplingConfig
from sfumato.networks import UNetConfig
from sfumato.training import (
    Budget,
    CheckpointConfig,
    LogConfig,
    OptimizerConfig,
    PreviewConfig,
    ValidationConfig,
)
from tests.helpers.image_bytes import encode, noise


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))


# --- the shapes -----------------------------------------------------------------------------------

configs = st.builds(
    BucketConfig,
    count=st.integers(1, 15),
    step=st.sampled_from([1, 2, 4, 8, 16, 32, 64]),
    max_ratio=st.floats(1.0, 8.0),
)
fine = st.tuples(
    st.integers(1, 15), st.sampled_from([1, 2, 4, 8, 16]), st.floats(1.0, 8.0), st.integers(4, 40)
)


@settings(max_examples=300, deadline=None)
@given(config=configs, resolution=st.integers(8, 1024))
def test_shapes_are_multiples_within_the_area_and_the_ratio(
    config: BucketConfig, resolution: int
) -> None:
    try:
        shapes = config.shapes(resolution)
    except ConfigError:
        assert resolution % config.step  # where the square fits there is always a shape
        return
    assert 1 <= len(shapes) == len(set(shapes)) <= config.count
    for height, width in shapes:
        assert height % config.step == width % config.step == 0
        assert 0 < height * width <= resolution**2
        assert max(height / width, width / height) <= config.max_ratio
    aspects = [math.log(width / height) for height, width in shapes]
    assert aspects == sorted(aspects)
    assert len(set(aspects)) == len(aspects)


@settings(max_examples=300, deadline=None)
@given(parts=fine)
def test_the_square_is_among_them_where_it_fits(parts: tuple) -> None:
    count, step, ratio, steps = parts
    config = BucketConfig(count=count, step=step, max_ratio=ratio)
    assert (step * steps, step * steps) in config.shapes(step * steps)


@settings(max_examples=300, deadline=None)
@given(parts=fine)
def test_no_shape_is_far_smaller_than_the_square(parts: tuple) -> None:
    """Less than one step along a side is given away."""
    count, step, ratio, steps = parts
    resolution = step * steps
    for height, width in BucketConfig(count=count, step=step, max_ratio=ratio).shapes(resolution):
        assert height * width > resolution**2 - step * max(height, width), (height, width)


@settings(max_examples=300, deadline=None)
@given(parts=fine)
def test_tall_and_wide_are_treated_alike(parts: tuple) -> None:
    count, step, ratio, steps = parts
    shapes = BucketConfig(count=count, step=step, max_ratio=ratio).shapes(step * steps)
    assert {(width, height) for height, width in shapes} == set(shapes)


@pytest.mark.parametrize("count", [2, 4, 6])
def test_the_square_is_one_of_an_even_count_too(count: int) -> None:
    assert (64, 64) in BucketConfig(count=count, step=8).shapes(64)


def test_shapes_by_hand() -> None:
    assert BucketConfig(count=1).shapes(64) == ((64, 64),)
    assert BucketConfig(count=3, step=8, max_ratio=2).shapes(64) == ((80, 48), (64, 64), (48, 80))
    assert BucketConfig(count=5, step=8, max_ratio=2).shapes(64) == (
        (80, 48),
        (72, 56),
        (64, 64),
        (56, 72),
        (48, 80),
    )
    assert BucketConfig(count=9, step=8, max_ratio=1.4).shapes(64) == ((72, 56), (64, 64), (56, 72))
    assert BucketConfig(count=9, step=8, max_ratio=1).shapes(64) == ((64, 64),)


def test_a_step_that_fits_no_shape_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match="multiples of 64"):
        BucketConfig(step=64).shapes(32)
    for wrong in ({"count": 0}, {"step": 0}, {"max_ratio": 0.5}, {"max_ratio": 9}):
        with pytest.raises(ConfigError, match=r"data\.buckets"):
            BucketConfig(**wrong)
    with pytest.raises(ConfigError, match="quarter turns"):
        DataConfig(buckets=BucketConfig(), augment=AugmentConfig(quarter_turns="all"))


# --- which image goes where -----------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(width=st.integers(3, 60), height=st.integers(3, 60), count=st.sampled_from([1, 3, 5, 9]))
def test_each_image_takes_the_shape_of_the_nearest_ratio(
    width: int, height: int, count: int
) -> None:
    shapes = BucketConfig(count=count, step=4, max_ratio=3).shapes(16)
    form = PixelFormat(shapes=shapes, channels=1)
    found = decode(encode(Image.new("L", (width, height), 9)), form)
    distances = [abs(math.log(w / h) - math.log(width / height)) for h, w in shapes]
    assert distances[found.shape] == min(distances)
    assert found.pixels.shape == (1, *shapes[found.shape])


def fill(root: Path, sizes: list[tuple[int, int]]) -> Path:
    """Images of these (width, height), every second one of another category."""
    for number, (width, height) in enumerate(sizes):
        path = root / "ab"[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(noise(height, width, seed=number)))
    return root


def test_the_share_that_cropping_costs(tmp_path: Path) -> None:
    sizes = [(16, 16), (32, 16), (16, 32), (64, 16), (20, 16), (48, 48)]
    root = str(fill(tmp_path / "images", sizes))
    squares = index(DataConfig(source=Folder(root), resolution=16))
    assert squares.crop_loss == pytest.approx(np.mean([0, 1 / 2, 1 / 2, 3 / 4, 1 / 5, 0]))
    buckets = BucketConfig(count=5, step=4, max_ratio=2)
    shaped = index(DataConfig(source=Folder(root), resolution=16, buckets=buckets))
    lost = []
    for width, height in sizes:
        best = min(
            buckets.shapes(16),
            key=lambda shape: abs(math.log(shape[1] / shape[0] * height / width)),
        )
        kept = min(width / best[1], height / best[0])
        lost.append(1 - kept**2 * best[0] * best[1] / (width * height))
    assert shaped.crop_loss == pytest.approx(np.mean(lost))
    assert shaped.crop_loss < 0.6 * squares.crop_loss
    assert shaped.summary()["crop_loss"] == pytest.approx(np.mean(lost), abs=1e-4)
    assert sum(shaped.summary()["shapes"].values()) == len(sizes)


def test_turned_images_count_by_how_they_are_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.jpg").write_bytes(encode(noise(16, 32), "JPEG", exif=exif))
    (tmp_path / "b.jpg").write_bytes(encode(noise(32, 16, seed=1), "JPEG"))
    dataset = index(
        DataConfig(
            source=Folder(str(tmp_path)), resolution=16, buckets=BucketConfig(count=3, step=4)
        )
    )
    height, width = dataset.config.pixel_format().shapes[dataset.shapes[0]]
    assert dataset.shapes[0] == dataset.shapes[1]
    assert height > width


# --- training on several shapes -------------------------------------------------------------------

SIZES = [(16, 16)] * 12 + [(24, 12)] * 9 + [(12, 24)] * 7 + [(20, 16)] * 6


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return fill(tmp_path / "images", SIZES)


def mixed(root: Path, **changes) -> DataConfig:
    return DataConfig(
        **{
            "source": Folder(str(root)),
            "resolution": 16,
            "buckets": BucketConfig(count=5, step=4),
            "holdout": 0.2,
            **changes,
        }
    )


KEEPING = {"cached": {}, "in memory": {"cache": "off"}, "read": {"cache": "off", "memory_gib": 0.0}}


def opened(root: Path, keeping: str = "cached", **changes) -> Dataset:
    dataset = index(mixed(root, **KEEPING[keeping], **changes))
    assert len(np.unique(dataset.shapes[dataset.training])) >= 3
    return dataset


@pytest.mark.parametrize(("batch_size", "keeping"), [(4, "cached"), (7, "read"), (64, "in memory")])
def test_every_sample_comes_once_an_epoch_in_contiguous_parts_of_one_shape(
    photos: Path, batch_size: int, keeping: str
) -> None:
    dataset = opened(photos, keeping)
    plan = BatchPlan(seed=3, shapes=dataset.shapes[dataset.training], batch_size=batch_size)
    shapes = dataset.config.pixel_format().shapes
    seen: list[bytes] = []
    number = 0
    for step, batch in enumerate(
        islice(batches(dataset, plan, start=0), -(-2 * plan.size // batch_size))
    ):
        assert len(batch) == batch_size
        positions = dataset.training[plan.batch(step)]
        at = 0
        for group in batch.groups:
            assert group.first == number
            here = positions[at : at + len(group)]
            assert len(set(dataset.shapes[here])) == 1
            assert group.images.shape == (len(group), 3, *shapes[dataset.shapes[here[0]]])
            assert torch.equal(group.context["category"], dataset.labels[torch.from_numpy(here)])
            assert group.context["augmentation"].shape == (len(group), 0)
            seen += [image.numpy().tobytes() for image in group.images]
            number += len(group)
            at += len(group)
        kinds = [group.images.shape[1:] for group in batch.groups]
        assert all(a != b for a, b in pairwise(kinds))
    for epoch in range(2):
        counts = Counter(seen[epoch * plan.size : (epoch + 1) * plan.size])
        assert len(counts) == plan.size
        assert set(counts.values()) == {1}


def test_kept_and_read_images_are_the_same(photos: Path) -> None:
    found = {}
    for keeping in KEEPING:
        dataset = opened(
            photos,
            keeping,
            augment=AugmentConfig(flip="horizontal", rotation_degrees=10, karras=0.3),
        )
        plan = BatchPlan(seed=1, shapes=dataset.shapes[dataset.training], batch_size=6)
        found[keeping] = [
            (
                group.first,
                group.images.numpy().tobytes(),
                group.context["augmentation"].numpy().tobytes(),
            )
            for batch in islice(batches(dataset, plan, start=2), 4)
            for group in batch.groups
        ]
    assert found["cached"] == found["in memory"] == found["read"]


def test_the_usual_shape_is_the_most_frequent_one(photos: Path) -> None:
    dataset = opened(photos)
    number = int(np.bincount(dataset.shapes).argmax())
    assert dataset.image_shape == (3, *dataset.config.pixel_format().shapes[number])
    assert (dataset.shapes[dataset.with_common_shape(dataset.training)] == number).all()


def test_training_validation_and_previews_of_several_shapes(photos: Path, tmp_path: Path) -> None:
    run = recipes.Run(
        name="mixed",
        data=mixed(
            photos, augment=AugmentConfig(flip="horizontal", rotation_degrees=5, karras=0.12)
        ),
        network=UNetConfig(
            channels=32, multipliers=(1, 1), blocks=1, attention_depths=(1,), head_channels=32
        ),
        conditioner=ContextConfig(category=CategoryConfig(size=8)),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=1),
        batch_size=20,
        micro_batch=6,
        precision="float32",
        budget=Budget(steps=2),
        log=LogConfig(every_steps=1),
        checkpoint=CheckpointConfig(every_steps=1, keep=1),
        validation=ValidationConfig(every_steps=1, samples=4, copy_samples=0),
        preview=PreviewConfig(every_steps=2, num=2),
        sampling=SamplingConfig(steps=3),
    )
    path = runs.train(run, run=tmp_path / "run")
    assert json.loads((path / "status.json").read_text())["state"] == "finished"
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert all(
        math.isfinite(line["validation/ema/eps_mse"])
        for line in lines
        if "validation/ema/eps_mse" in line
    )
    assert sum("validation/ema/eps_mse" in line for line in lines) == 2
    assert (path / "samples" / "real.png").is_file()
    assert (path / "samples" / "step-000000002" / "grid.png").is_file()
    images = runs.load(path).sample(2, category=["a", "b"], seed=0)
    assert images.shape == (2, *opened(photos).image_shape)


def test_the_loss_does_not_depend_on_the_order_of_parts_in_memory(
    photos: Path, tmp_path: Path
) -> None:
    """Micro-batches only split the work: one by one or all at once, the first loss is the same."""
    losses = []
    for micro in (3, None):
        run = recipes.Run(
            name="mixed",
            data=mixed(photos),
            network=UNetConfig(
                channels=32, multipliers=(1, 1), blocks=1, attention_depths=(1,), head_channels=32
            ),
            optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=1),
            batch_size=20,
            micro_batch=micro,
            precision="float32",
            budget=Budget(steps=1),
            log=LogConfig(every_steps=1),
            validation=ValidationConfig(every_steps=5, samples=2, copy_samples=0),
            preview=PreviewConfig(every_steps=5, num=1),
            sampling=SamplingConfig(steps=1),
        )
        path = runs.train(run, run=tmp_path / f"run-{micro}")
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        losses.append(next(line["train/loss"] for line in lines if "train/loss" in line))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
