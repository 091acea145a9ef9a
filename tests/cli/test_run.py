"""One tiny run from training to samples, evaluation and explanation, each by its verb."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato import __version__, load
from sfumato.cli.sample_options import grid_labels
from sfumato.config import load_yaml_file
from sfumato.data import Digits
from sfumato.errors import ConfigError
from sfumato.evaluation.classifier import train_classifier
from sfumato.generation.pipeline import to_unit
from sfumato.observability.images import GAP
from sfumato.sampling import KeyedNoise
from tests.helpers.cli import Result, sfumato

TINY = [
    "budget.steps=6",
    "network.channels=32",
    "precision=float32",
    "preview.num=10",
    "validation.samples=20",
    "validation.copy_samples=0",
]
TILE = 56 + GAP


@pytest.fixture(autouse=True)
def _quick_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are compared in random features: what the trained network gives is tested elsewhere."""
    monkeypatch.setattr("sfumato.evaluation.extractors._package", lambda: None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    path = tmp_path_factory.mktemp("runs") / "tiny"
    return path, sfumato("train", "digits", *TINY, "--run", path)


@pytest.fixture
def run(trained: tuple[Path, Result]) -> Path:
    return trained[0]


def train_classifiers_briefly(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    quick = functools.partial(train_classifier, steps=steps)
    monkeypatch.setattr("sfumato.evaluation.report.train_classifier", quick)


def settings(path: Path) -> dict:
    with Image.open(path) as image:
        return json.loads(image.text["sfumato"])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_training_prints_the_run_and_only_that_on_standard_output(
    trained: tuple[Path, Result],
) -> None:
    path, result = trained
    assert result.code == 0
    assert result.out == f"{path}\n"
    assert "1506 training images, 291 held out, 10 categories, 8 px; 0.73M parameters" in result.err
    assert "step 6: held-out noise error MSE " in result.err


def test_a_run_says_what_program_trained_it(run: Path) -> None:
    environment = json.loads((run / "environment.json").read_text())
    assert environment["sfumato"] == __version__
    assert environment["commit"] is None or len(environment["commit"]) == 40


def test_a_run_holds_what_it_should(run: Path) -> None:
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 6)
    assert load_yaml_file(run / "config.yaml")["budget"]["steps"] == 6
    data = json.loads((run / "data.json").read_text())
    assert (data["images"], data["training"], data["holdout"]) == (1797, 1506, 291)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 1
    assert lines[0]["train/loss"] > 0
    assert any("validation/ema/r2" in line for line in lines)
    assert {path.name for path in (run / "samples").iterdir()} == {
        "real.png",
        "step-000000000",
        "step-000000006",
    }
    assert Image.open(run / "samples/step-000000006/grid.png").size == (GAP + 10 * TILE, GAP + TILE)


def test_a_run_is_not_trained_over(run: Path) -> None:
    before = (run / "status.json").read_bytes()
    result = sfumato("train", "digits", *TINY, "--run", run)
    assert result.code == 2
    assert f"{run}: there is already a run here\n  hint: `sfumato resume {run}`" in result.err
    assert (run / "status.json").read_bytes() == before


def test_a_run_is_a_source_of_its_configuration(run: Path) -> None:
    changed = sfumato("config", "diff", "digits", run).out.splitlines()
    assert "budget.steps: None -> 6" in changed
    assert "preview.num: 40 -> 10" in changed
    assert "budget.minutes: 1.0 -> None" in changed  # replaced by the steps
    assert len(changed) == 6  # channels are the recipe's


def test_sample_writes_images_and_a_grid_with_their_settings(run: Path, tmp_path: Path) -> None:
    result = sfumato(
        "sample",
        run,
        "--num",
        5,
        "--category",
        3,
        "--category",
        7,
        "--steps",
        4,
        "--sampler",
        "ddim",
        "--guidance",
        2,
        "--seed",
        11,
        "--out",
        tmp_path / "out",
    )
    assert result.code == 0
    assert result.out == f"{tmp_path / 'out' / 'grid.png'}\n"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "grid.png",
        *(f"{i:05d}.png" for i in range(5)),
    }
    expected = {
        "run": "tiny",
        "seed": 11,
        "category": ["3", "7"],
        "steps": 4,
        "sampler": "ddim",
        "weights": "ema",
        "guidance": 2.0,
    }
    assert expected.items() <= settings(tmp_path / "out" / "grid.png").items()
    assert {**expected, "index": 3}.items() <= settings(tmp_path / "out" / "00003.png").items()
    assert Image.open(tmp_path / "out" / "00003.png").size == (8, 8)
    assert Image.open(tmp_path / "out" / "00003.png").mode == "L"
    # a line above each row
    assert Image.open(tmp_path / "out" / "grid.png").size == (GAP + 3 * TILE, GAP + 2 * (TILE + 20))


def test_a_grid_is_labelled_where_images_were_asked_for_different_things() -> None:
    assert grid_labels(["a cat", "a dog"], ["7"], 3) == ["a cat, 7", "a dog, 7", "a cat, 7"]
    assert grid_labels(["a cat"], None, 3) == grid_labels(None, None, 2) == []
    assert grid_labels(["x" * 100_000, "y"], None, 2) == ["x" * 77 + "...", "y"]


def test_sample_by_default_uses_the_runs_own_settings_and_folder(run: Path) -> None:
    result = sfumato("sample", run, "--num", 1)
    assert result.code == 0
    assert result.out == f"{run}/generated/seed-0/grid.png\n"
    said = settings(run / "generated/seed-0/00000.png")
    assert (said["steps"], said["sampler"], said["category"], said["seed"]) == (
        20,
        "dpm-solver++2m",
        [],
        0,
    )


def test_the_same_command_makes_the_same_images_and_another_seed_does_not(
    run: Path, tmp_path: Path
) -> None:
    for folder, seed, num in (("a", 0, 2), ("b", 0, 3), ("c", 1, 2)):
        assert (
            sfumato(
                "sample",
                run,
                "--num",
                num,
                "--category",
                4,
                "--steps",
                3,
                "--seed",
                seed,
                "--out",
                tmp_path / folder,
            ).code
            == 0
        )
    a, b, c = (pixels(tmp_path / folder / "00001.png") for folder in "abc")
    assert np.abs(a - b).max() <= 1  # to float rounding, whatever the number
    assert np.abs(a - c).max() > 20


def test_weights_and_precisions_that_there_are_not_are_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match="weights = 'EMA'"):
        load(run, weights="EMA")
    with pytest.raises(ConfigError, match="precision = 'fp16'"):
        load(run, precision="fp16")


def test_averaged_and_raw_weights_differ(run: Path, tmp_path: Path) -> None:
    for weights in ("ema", "raw"):
        assert (
            sfumato(
                "sample",
                run,
                "--num",
                4,
                "--steps",
                3,
                "--weights",
                weights,
                "--out",
                tmp_path / weights,
            ).code
            == 0
        )
    grids = [pixels(tmp_path / weights / "grid.png") for weights in ("ema", "raw")]
    assert (grids[0] != grids[1]).any()
    assert settings(tmp_path / "raw" / "grid.png")["weights"] == "raw"


def test_the_network_is_compiled_if_asked(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the images are the same: tests/training/test_compiling.py."""
    compiled = []
    train_classifiers_briefly(monkeypatch, steps=5)
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda network, mode: compiled.append(type(network).__name__)
    )
    sample = ("sample", run, "--num", 1, "--steps", 1, "--out", tmp_path)
    evaluate = (
        "evaluate",
        run,
        "--num",
        10,
        "--guidance",
        1,
        "--out",
        tmp_path / "evaluation.json",
    )
    for command, times in ((sample, 0), ((*sample, "--compile"), 1), ((*evaluate, "--compile"), 2)):
        assert sfumato(*command).code == 0
        assert compiled == ["UNet"] * times


def test_a_trajectory_shows_noisy_images_and_guesses(run: Path, tmp_path: Path) -> None:
    result = sfumato("sample", run, "--num", 2, "--steps", 4, "--trajectory", "--out", tmp_path)
    assert result.out == f"{tmp_path}/trajectory.png\n{tmp_path}/grid.png\n"
    image = Image.open(tmp_path / "trajectory.png")
    left, top = 16 + 7 * len("guess of x0"), 22
    # four steps and the result; two rows for each image
    assert image.size == (left + 5 * TILE, top + 4 * TILE)

    def tile(row: int, column: int) -> np.ndarray:
        place = np.asarray(image)[top + row * TILE :, left + column * TILE :]
        return place[3:56:7, 3:56:7, 0].astype(int)

    final = pixels(tmp_path / "00001.png")
    assert (tile(2, 4) == final).all()
    assert (tile(3, 4) == final).all()
    assert (tile(3, 3) == final).all()  # the last guess is the result
    start = to_unit(KeyedNoise(0)(torch.empty(2, 1, 8, 8)))[1, 0]
    assert np.abs(tile(2, 0) - 255 * start.numpy()).max() <= 1


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--category", "seven"], "no category 'seven'\n  hint: the model knows 0, 1, 2, 3"),
        (
            ["--sampler", "dpm-solver++"],
            "unknown sampler 'dpm-solver++'\n  hint: did you mean 'dpm-solver++2m'? there are ddim, "
            "ddpm",
        ),
    ],
)
def test_what_the_model_does_not_know_is_said(run: Path, option: list[str], said: str) -> None:
    result = sfumato("sample", run, *option)
    assert result.code == 2
    assert said in result.err


def test_explaining_a_run_uses_its_model(run: Path, tmp_path: Path) -> None:
    result = sfumato("explain", run)
    assert result.code == 0
    assert [Path(line).name for line in result.out.splitlines()][-3:] == [
        "way_back.png",
        "guidance.png",
        "README.md",
    ]
    assert "by the trained model" in (run / "explained" / "README.md").read_text()
    assert sfumato("explain", run, "--out", tmp_path / "here").out.startswith(
        f"{tmp_path}/here/schedule.png\n"
    )


def test_explaining_a_steered_run_draws_rising_guidance(run: Path, tmp_path: Path) -> None:
    figure = next(
        Path(line)
        for line in sfumato("explain", run, "--out", tmp_path).out.split()
        if "guidance.png" in line
    )
    scales = 5
    assert Image.open(figure).size == (
        16 + 7 * len("guidance 1.5") + 10 * TILE,
        GAP + 20 + scales * TILE,
    )
    assert "at guidance 1, 1.5, 2, 3, 5, 20 steps" in (tmp_path / "README.md").read_text()


def test_samplers_of_a_run_are_compared(run: Path) -> None:
    result = sfumato("compare", run, "--sampler", "ddpm:3", "--sampler", "ddim:2")
    assert result.code == 0
    assert result.out.splitlines()[-1] == f"{run}/compared/seed-0.png"
    assert settings(run / "compared" / "seed-0.png")["rows"][1] == {
        "sampler": "ddim",
        "steps": 2,
        "guidance": 1.3,
    }


def test_a_folder_with_bad_images_is_trained_on_and_they_are_listed(tmp_path: Path) -> None:
    for number, entry in enumerate(Digits().listing().entries[:40]):
        path = tmp_path / "digits" / entry.category / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(entry.image.read())
    bad = {
        "0/cut.jpg": b"\xff\xd8\xff\xe0",
        "1/empty.png": b"",
        "2/page.png": b"<html>",
        "3/ev\x1b[2Jil.gif": b"GIF89a",
    }
    for name, data in bad.items():
        (tmp_path / "digits" / name).write_bytes(data)
    small = [
        "network.channels=32",
        "network.multipliers=[1]",
        "network.attention_depths=[]",
        "precision=float32",
        "preview.num=2",
        "sampling.steps=2",
        "validation.copy_samples=0",
    ]
    result = sfumato(
        "train",
        tmp_path / "digits",
        "budget.steps=2",
        "data.cache=off",
        "data.memory_gib=0",
        *small,
        "--run",
        tmp_path / "run",
    )
    assert result.code == 0
    assert "44 files: 40 images used, 4 left out (" in result.err
    assert "\x1b" not in result.err
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    assert {reject["file"] for reject in data["rejects"]} == {
        name.replace("\x1b", "\\x1b") for name in bad
    }
    assert all(reject["reason"] for reject in data["rejects"])
    assert data["images"] == 40


def test_evaluate_prints_a_table_and_writes_its_figures(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_classifiers_briefly(monkeypatch, steps=30)
    out = tmp_path / "here" / "figures.json"
    result = sfumato("evaluate", run, "--num", 20, "--guidance", 1, "--guidance", 2, "--out", out)
    assert result.code == 0
    figures = json.loads(out.read_text())
    assert [row["name"] for row in figures["rows"]] == [
        "held-out real images",
        "training images",
        "samples, guidance 1",
        "samples, guidance 2",
    ]
    assert [row["n"] for row in figures["rows"]] == [291, 20, 20, 20]
    assert f"accuracy {figures['classifier']['value']:.1%} [" in result.out
    assert f"{figures['rows'][3]['category_accuracy']['value']:.1%} [" in result.out
    assert all(sentence in result.out for sentence in figures["sentences"])
    assert f"figures: {out}; images: " in result.out
    assert figures["adherence_guidance"] == 2
    assert "adherence to the condition (guidance 2;" in result.out
    sheet = Image.open(tmp_path / "here" / "nearest-guidance-2.png")
    assert sheet.size == (16 + 7 * len("nearest real") + 10 * TILE, GAP + 2 * TILE)
    assert f"images: {out.parent}/*.png" in result.out
    assert Image.open(out.parent / "asked-by-category.png").width > 10 * 96


def test_evaluate_without_categories_measures_how_far_captions_are_followed(tmp_path: Path) -> None:
    for number in range(24):
        Image.new("RGB", (8, 8), (number * 10, 99, 255 - number * 10)).save(
            tmp_path / f"{number}.png"
        )
        (tmp_path / f"{number}.txt").write_text(f"colour {number}")
    settings = (
        "network.channels=32",
        "network.multipliers=[1]",
        "network.attention_depths=[]",
        "data.holdout=0.3",
        "sampling.steps=3",
        "validation.copy_samples=0",
    )
    run = tmp_path / "run"
    trained = sfumato(
        "train",
        tmp_path,
        "--run",
        run,
        "budget.steps=2",
        "precision=float32",
        "data.resolution=8",
        *settings,
    )
    assert trained.code == 0
    result = sfumato("evaluate", run, "--num", 4)
    assert result.code == 0
    assert "category accuracy" not in result.out
    assert "held-out real images" in result.out
    assert "note: only " in result.out
    assert "note: no Fréchet distance (FID): it takes " in result.out
    assert "rank of its own image" in result.out
    assert Image.open(run / "evaluation" / "asked-by-text.png").size
    assert sfumato("explain", run).code == 0  # though there are no categories to draw


def test_a_run_among_the_images_is_no_part_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cd photos; sfumato train .` puts it there."""
    for number in range(20):
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)).save(
            tmp_path / f"{number}.png"
        )
    monkeypatch.chdir(tmp_path)
    small = (
        "network.channels=32",
        "network.multipliers=[1]",
        "network.attention_depths=[]",
        "precision=float32",
        "data.holdout=0.3",
        "sampling.steps=3",
        "validation.copy_samples=0",
    )
    assert sfumato("train", ".", "budget.steps=2", "data.resolution=8", *small).code == 0
    (run,) = Path("runs").iterdir()
    assert list((run / "samples").rglob("*.png"))
    assert sfumato("resume", run, "budget.steps=3").code == 0
    result = sfumato("evaluate", run, "--num", 4)
    assert result.code == 0
    assert "KID to held-out" in result.out
    assert "category accuracy" not in result.out


def test_evaluate_by_default_compares_no_guidance_with_the_runs_own(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_classifiers_briefly(monkeypatch, steps=5)
    result = sfumato("evaluate", run, "--num", 10, "--json")
    assert result.code == 0
    assert json.loads(result.out) == json.loads(
        (run / "evaluation" / "evaluation.json").read_text()
    )
    own = load_yaml_file(run / "config.yaml")["sampling"]["guidance"]
    figures = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert [row["name"] for row in figures["rows"][2:]] == [
        "samples, guidance 1",
        f"samples, guidance {own:g}",
    ]


def test_evaluate_compares_in_the_features_that_are_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_classifiers_briefly(monkeypatch, steps=5)
    at = ("--num", 10, "--guidance", 1, "--out", tmp_path / "figures.json")
    assert sfumato("evaluate", run, "--features", "random", *at).code == 0
    plain = json.loads((tmp_path / "figures.json").read_text())
    assert plain["extractor"] == "random features"
    assert plain["rows"][2]["good"]["extractor"] == "random features"
    refused = sfumato("evaluate", run, "--features", tmp_path / "nothing", *at)
    assert refused.code == 2
    assert "features" in refused.err
