"""The card of an exported model: what the run knows, and an honest "not measured" for the rest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from sfumato.adapters import LoRA
from sfumato.interop.model_card import write_card
from sfumato.interop.trained_model import TrainedModel
from sfumato.recipes.builtin import recipe
from tests.helpers.pipelines import tiny_pipeline


def figure(value: float, low: float | None, high: float | None, n: int) -> dict[str, object]:
    return {
        "value": value, "low": low, "high": high, "n": n, "metric": "m", "extractor": "none",
        "reference": "36 training images",
    }  # fmt: skip


FIGURES = {
    "extractor": "random features",
    "copy_rule": "near-duplicate of a training image",
    "sentences": ["guidance 2: no sign of copying."],
    "remarks": ["the distance is rough"],
    "rows": [
        {
            "name": "held out", "n": 12, "category_accuracy": figure(0.9, 0.6, 0.99, 12),
            "kid_held_out": None, "kid_training": figure(0.25, None, None, 12), "good": None,
            "variety": None, "copies": figure(0.0, 0.0, 0.2, 12),
            "nearest": figure(3.25, 3.0, 3.5, 12),
        },
        {
            "name": "guidance 2", "n": 50, "category_accuracy": figure(0.5, 0.37, 0.63, 50),
            "kid_held_out": figure(1.5, 1.2, 1.75, 50), "kid_training": figure(1.0, 0.9, 1.1, 50),
            "good": figure(0.62, 0.5, 0.7, 50), "variety": figure(0.48, 0.4, 0.6, 50),
            "copies": figure(0.04, 0.01, 0.13, 50), "nearest": figure(2.5, 2.0, 3.0, 50),
        },
    ],
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> TrainedModel:
    run = replace(recipe("digits"), name="numbers", adapter=LoRA(rank=3))
    (tmp_path / "run").mkdir()
    (tmp_path / "out").mkdir()
    pipeline = tiny_pipeline("category")
    return TrainedModel(pipeline=pipeline, run=run, directory=tmp_path / "run", step=50)


def card(model: TrainedModel) -> str:
    write_card(model, model.directory.parent / "out", "sfumato sample FOLDER")
    return (model.directory.parent / "out" / "README.md").read_text()


def section(text: str, title: str) -> str:
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_what_was_not_measured_is_called_so(model: TrainedModel) -> None:
    text = card(model)
    for title in ("Evaluation", "Memorization", "Limits"):
        assert "not measured" in section(text, title)
    assert section(text, "Training data").strip() == "- number of images: unknown"
    assert "The run has drawn no samples." in text
    assert not (model.directory.parent / "out" / "samples.png").exists()
    assert "sfumato sample FOLDER" in section(text, "How to run it")


def test_figures_of_the_run_are_given_with_their_n_and_interval(model: TrainedModel) -> None:
    (model.directory / "evaluation").mkdir()
    (model.directory / "evaluation" / "evaluation.json").write_text(json.dumps(FIGURES))
    record = {
        "images": 40, "training": 36, "holdout": 4, "captioned": 0, "categories": {"a": 1, "b": 2},
        "attribution": "CC BY-SA 4.0", "notes": {"duplicate": ["x", "y"]},
    }  # fmt: skip
    (model.directory / "data.json").write_text(json.dumps(record))
    text = card(model)
    evaluation = section(text, "Evaluation")
    assert (
        "| held out | 12 | not measured | 0.250 | not measured | not measured | "
        "90.0% [60.0%, 99.0%] |"
    ) in evaluation
    assert (
        "| guidance 2 | 50 | 1.500 [1.200, 1.750] | 1.000 [0.900, 1.100] | 62.0% [50.0%, 70.0%] | "
        "48.0% [40.0%, 60.0%] | 50.0% [37.0%, 63.0%] |"
    ) in evaluation
    assert "Features: random features." in evaluation
    assert "no sign of copying" in evaluation
    assert "the distance is rough" in evaluation
    copies = "guidance 2: 4.0% [1.0%, 13.0%] of 50 are copies, among 36 training images"
    assert copies in section(text, "Memorization")
    assert "copy: near-duplicate of a training image" in section(text, "Memorization")
    data = section(text, "Training data")
    assert "images: 40, of which 36 for training and 4 held out" in data
    assert "license of the images: CC BY-SA 4.0" in data
    assert "among them: 2 duplicates" in data
    training = section(text, "Training")
    batch = model.run.batch_size
    assert f"steps: 50 of {batch} images, each image seen {50 * batch / 36:.1f} times" in training
    assert "LoRA of rank 3" in training
    assert "learning rate: 0.002" in training


def test_a_fine_tuned_model_is_compared_with_its_base(model: TrainedModel) -> None:
    assert "Compared with its base" not in card(model)
    gain = {"mean": 0.25, "low": 0.2, "high": 0.3}
    path = model.directory / "best" / "verdict.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"best_base": {"gain": gain, "drift": 0.047}}))
    text = section(card(model), "Compared with its base")
    assert "25.0% below the base's, 95 % interval [20.0%, 30.0%]" in text
    assert "over the base's own error there: 4.7%" in text


def test_the_newest_samples_of_the_run_are_shown(model: TrainedModel) -> None:
    for step, colour in ((10, "red"), (50, "blue")):
        folder = model.directory / "samples" / f"step-{step:09d}"
        folder.mkdir(parents=True)
        Image.new("RGB", (4, 4), colour).save(folder / "grid.png")
    assert "![Samples of the run at step 50](samples.png)" in card(model)
    shown = Image.open(model.directory.parent / "out" / "samples.png")
    assert shown.getpixel((0, 0)) == (0, 0, 255)


def test_hubs_can_read_its_head(model: TrainedModel) -> None:
    name = 'no: "name" # here'
    text = card(replace(model, run=replace(model.run, name=name)))
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "unknown"
    assert head["library_name"] == "sfumato"
    assert head["tags"] == ["diffusion", "sfumato", "lora"]
    assert f"# {name}" in text


def test_an_evaluation_of_an_earlier_version_counts_as_none(model: TrainedModel) -> None:
    (model.directory / "evaluation").mkdir()
    old = {"rows": [{"name": "held out", "copies": 0.0, "frechet": 1.5}]}
    (model.directory / "evaluation" / "evaluation.json").write_text(json.dumps(old))
    for title in ("Evaluation", "Memorization"):
        assert "not measured" in section(card(model), title)
