"""The adherence gap: nothing before training, above zero once a context steers, and nothing where
it tells nothing.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfumato.conditioners import (
    CategoryConfig,
    DoodleConfig,
    ImageConfig,
    LearnedTextConfig,
    ReferenceConfig,
)
from sfumato.contexts import ContextConfig
from sfumato.data import AugmentConfig, DataConfig, Folder
from sfumato.data.decoding import PixelFormat, decode
from sfumato.recipes import Run
from sfumato.runs import prepare, train
from sfumato.runs.preparation import open_data
from sfumato.runs.training import build_trainer
from sfumato.storage.run_directory import RunDirectory
from sfumato.training import (
    Budget,
    CheckpointConfig,
    FixedEMA,
    OptimizerConfig,
    PreviewConfig,
    ValidationConfig,
)
from tests.helpers.runs import tiny_run

STEPS = 40


def told_images(root: Path, *, told: bool, count: int = 80) -> Path:
    """Noisy images, half of them bright on the left and half on the right; folder and caption say
    which, or are drawn by lot.
    """
    generator = np.random.default_rng(0)
    for number in range(count):
        left = number % 2
        pixels = generator.integers(0, 128, (8, 8))
        pixels[:, 4 - 4 * left : 8 - 4 * left] += 128
        name = ("right", "left")[left if told else generator.integers(2)]
        path = root / name / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"bright on the {name}")
    return root


def settings(root: Path, steps: int = STEPS, **contexts: Any) -> Run:
    data = DataConfig(
        source=Folder(str(root)),
        resolution=8,
        channels=1,
        augment=AugmentConfig(),
        holdout=0.3,
        cache="off",
    )
    return tiny_run(
        root,
        data=data,
        conditioner=ContextConfig(**contexts),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=3),
        ema=FixedEMA(0.8),
        batch_size=16,
        micro_batch=None,
        budget=Budget(steps=steps),
        validation=ValidationConfig(every_steps=STEPS, samples=60, bins=4, copy_samples=0),
        preview=PreviewConfig(every_steps=1000, num=2),
        checkpoint=CheckpointConfig(every_steps=1000),
    )


def gaps(run: Path, name: str) -> dict[str, float]:
    """What the last validation says of a context."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "validation/ema/eps_mse" in line][-1]
    prefix = f"validation/adherence/{name}/"
    return {
        key.removeprefix(prefix): value for key, value in last.items() if key.startswith(prefix)
    }


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return told_images(tmp_path_factory.mktemp("told"), told=True)


def untrained(root: Path, run: Path, **contexts: Any) -> dict[str, Any]:
    """The figures of a model that has learned nothing."""
    config = settings(root, **contexts)
    trainer = build_trainer(prepare(config), RunDirectory.create(run))
    return trainer.validate()


def test_an_untrained_model_follows_nothing(told: Path, tmp_path: Path) -> None:
    figures = untrained(
        told,
        tmp_path / "run",
        category=CategoryConfig(size=8),
        text=LearnedTextConfig(size=16, layers=1, heads=2),
    )
    names = {key.split("/")[2] for key in figures if key.startswith("validation/adherence/")}
    assert names == {"category", "text"}
    for name in names:
        for part in ("mean", "low", "high"):
            assert abs(figures[f"validation/adherence/{name}/{part}"]) < 1e-6
        assert len(figures[f"validation/adherence/{name}/bins"]) == 4


def test_a_model_without_contexts_has_no_such_figure(told: Path, tmp_path: Path) -> None:
    assert not [key for key in untrained(told, tmp_path / "run") if "adherence" in key]


def test_contexts_made_from_the_images_are_measured_too(told: Path, tmp_path: Path) -> None:
    figures = untrained(
        told,
        tmp_path / "run",
        doodle=DoodleConfig(),
        image=ImageConfig(),
        reference=ReferenceConfig(size=16),
    )
    assert {key.split("/")[2] for key in figures if "adherence" in key} == {
        "doodle",
        "image",
        "reference",
    }


@pytest.mark.parametrize(
    "times", [1, pytest.param(2, marks=pytest.mark.slow)]
)  # that each held-out image is looked at
def test_a_category_that_tells_the_image_steers_after_a_few_steps(
    told: Path, tmp_path: Path, times: int
) -> None:
    config = settings(told, category=CategoryConfig(size=8))
    samples = times * len(open_data(config).holdout)
    config = replace(config, validation=replace(config.validation, samples=samples))
    gap = gaps(train(config, run=tmp_path / "run"), "category")
    assert gap["mean"] > 0.01
    assert gap["low"] > 0
    assert gap["low"] < gap["mean"] < gap["high"]


def test_negative_control_a_category_drawn_by_lot_does_not(tmp_path: Path) -> None:
    root = told_images(tmp_path / "lot", told=False)
    gap = gaps(
        train(settings(root, category=CategoryConfig(size=8)), run=tmp_path / "run"), "category"
    )
    assert abs(gap["mean"]) < 0.005


def test_negative_control_a_category_that_is_always_hidden_does_not(
    told: Path, tmp_path: Path
) -> None:
    hidden = CategoryConfig(size=8, dropout=1.0)
    gap = gaps(train(settings(told, category=hidden), run=tmp_path / "run"), "category")
    assert abs(gap["mean"]) < 2e-3


@pytest.mark.slow
def test_each_context_is_measured_by_itself(told: Path, tmp_path: Path) -> None:
    """Text tells the image, and the category is never seen: one gap opens and the other does
    not.
    """
    contexts = {
        "category": CategoryConfig(size=8, dropout=1.0),
        "text": LearnedTextConfig(size=16, layers=1, heads=2),
    }
    run = train(settings(told, steps=2 * STEPS, **contexts), run=tmp_path / "run")
    assert gaps(run, "text")["low"] > 0
    assert gaps(run, "text")["mean"] > 5 * abs(gaps(run, "category")["mean"])


def test_the_images_are_what_they_are_said_to_be(told: Path) -> None:
    for name, bright in (("left", slice(0, 4)), ("right", slice(4, 8))):
        for path in (told / name).glob("*.png"):
            pixels = decode(path.read_bytes(), PixelFormat(shapes=((8, 8),), channels=1)).pixels[0]
            assert pixels[:, bright].min() > 127
            assert (pixels > 127).sum() == 32
    dataset = open_data(settings(told))
    # none are taken for copies of one another, and held out together
    assert len(set(dataset.clusters)) == 80
    assert len(set(dataset.labels[dataset.holdout].tolist())) == 2
