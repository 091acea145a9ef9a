"""A model that has never seen a 7 learns it from ten images, and keeps the other digits.

The bars are those of docs/fine-tuning.md. About eight minutes on two cores.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sfumato
from sfumato.data import Folder
from sfumato.recipes import recipe

pytestmark = pytest.mark.slow

OTHERS = [str(digit) for digit in range(10) if digit != 7]
SHOTS = 10


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `others` and `seven`, and a classifier's training set."""
    from sklearn.datasets import load_digits

    folder, data = tmp_path_factory.mktemp("digits"), load_digits()
    order = np.random.RandomState(0).permutation(len(data.images))
    training = order[: int(0.85 * len(order))]
    sevens = [number for number in training if data.target[number] == 7][:SHOTS]
    for number in training:
        label = int(data.target[number])
        place = folder / "others" / str(label) if label != 7 else folder / "seven"
        if label != 7 or number in sevens:
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.round(data.images[number] * 255 / 16).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def base(digits: Path) -> Path:
    """A model of the digits but 7."""
    run = recipe("digits")
    run = replace(run, data=replace(run.data, source=Folder(str(digits / "others"))))
    settings = ["budget={steps: 1100}", "batch_size=32", "precision=float32"]
    return sfumato.train(run, overrides=settings, run=digits / "base")


def read_as_asked(run: Path, categories: Sequence[str], num: int, **options: str) -> float:
    """The share of generated digits that a classifier of real ones reads as they were asked for."""
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    data = load_digits()
    reader = SVC(gamma=0.02, C=10).fit(data.data / 8 - 1, data.target)
    pipeline = sfumato.load(run, **options)
    images = pipeline.sample(num, category=list(categories), guidance=1.3, seed=3)
    asked = np.array([int(categories[i % len(categories)]) for i in range(num)])
    read = reader.predict((images * 2 - 1).flatten(1).numpy())
    return float((read == asked).mean())


def finetuned(base: Path, digits: Path, name: str, *overrides: str) -> Path:
    return sfumato.finetune(
        base,
        str(digits / "seven"),
        overrides=["data.category=7", *overrides],
        run=digits / name,
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_learns_the_new_digit_and_keeps_the_others(base: Path, digits: Path, seed: int) -> None:
    assert read_as_asked(base, OTHERS, 90) >= 0.97
    run = finetuned(base, digits, f"tuned-{seed}", f"seed={seed}")
    assert read_as_asked(run, ["7"], 60) >= 0.9
    assert read_as_asked(run, OTHERS, 90) >= 0.95
    report = json.loads((run / "finetuning" / "report.json").read_text())
    assert report["verdict"]["best_base"]["gain"]["low"] > 0
    assert report["verdict"]["best_base"]["drift"] < 0.1
    assert report["copies"] < 0.1


def test_without_preservation_it_forgets_and_the_report_says_stop(base: Path, digits: Path) -> None:
    run = finetuned(base, digits, "forgetful", "preservation=null", "budget.steps=400")
    verdict = json.loads((run / "best" / "verdict.json").read_text())
    assert verdict["stop"]
    assert verdict["base"]["drift"] > 0.5
    assert "the model forgets what its base knew" in verdict["sentence"]
    assert read_as_asked(run, OTHERS, 90, weights="ema") < 0.9  # the last step's
    assert read_as_asked(run, OTHERS, 90) >= 0.9  # the step that the verdict names


def test_prior_images_of_the_base_keep_the_others(base: Path, digits: Path) -> None:
    run = finetuned(base, digits, "prior", "preservation.num=90", "budget.steps=100")
    assert read_as_asked(run, OTHERS, 90, weights="ema") >= 0.9
    verdict = json.loads((run / "best" / "verdict.json").read_text())
    forgetful = finetuned(base, digits, "no-prior", "preservation=null", "budget.steps=100")
    without = json.loads((forgetful / "best" / "verdict.json").read_text())
    assert verdict["base"]["drift"] < 0.5 * without["base"]["drift"]
    assert verdict["base"]["gain"]["low"] > 0
