"""Whether the images are enough: sentences before and after training, and a run on half of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from torch import nn

from sfumato.autoencoders import KLConfig
from sfumato.data import AugmentConfig, Folder, index
from sfumato.errors import CheckpointError, RunError
from sfumato.networks import UNetConfig
from sfumato.recipes.autoencoder_stage import TrainedAutoencoder
from sfumato.reporting import compare_with_half, write_report
from sfumato.reporting.half_run import HalfComparison, _require_alike
from sfumato.runs import resume, train
from sfumato.training import Budget
from sfumato.training.denoising_error import Estimate
from sfumato.training.enough import after_training, before_training, is_protected
from sfumato.training.evidence import Copies, Look
from sfumato.training.stopping import verdict
from tests.helpers import cli
from tests.helpers.runs import images, tiny_run

HELD_OUT = 25


@pytest.mark.parametrize(
    ("count", "views", "protected", "said", "changed"),
    [
        (
            50_000,
            12.0,
            False,
            "50,000 images, each seen about 12 times by this budget: too few",
            "",
        ),
        (50_000, 0.4, True, "seen about 0.4 times by this budget: too few views to memorize", ""),
        (60, 40.0, False, "fewer than the 95 to 165 views at which small sets", ""),
        (60, 120.0, False, "about the 95 to 165 views", ""),
        (60, 720.0, False, "more than the 95 to 165 views", "set budget.epochs=165"),
        (60, 300.0, True, "with both, a set of 60 was still at its best after 450", ""),
        (60, 720.0, True, "more than the 450 until which", "set budget.epochs=450"),
        (5_000, 720.0, False, "sets of this size have not been measured", ""),
    ],
)
def test_views_say_before_training_whether_a_set_is_memorized(
    count: int, views: float, protected: bool, said: str, changed: str
) -> None:
    outlook = before_training(count, views, protected=protected)
    assert said in outlook.sentence
    assert outlook.change.startswith(changed)
    assert bool(outlook.change) == bool(changed)


def test_protection_is_augmentation_that_does_not_leak_together_with_dropout() -> None:
    karras, flips = AugmentConfig(karras=0.12), AugmentConfig(flip="horizontal")
    with_dropout, without = nn.Sequential(nn.Dropout(0.1)), nn.Sequential(nn.Dropout(0.0))
    assert is_protected(karras, with_dropout)
    assert not is_protected(karras, without)
    assert not is_protected(flips, with_dropout)
    preset = UNetConfig(channels=32, multipliers=(1,), attention_depths=(), dropout=0.1)
    assert is_protected(karras, preset.build(image_channels=1))


def looks(*errors: float, seen: float = 1.0, spread: float = 0.01, copies: int = 0) -> list[Look]:
    """Looks whose mean error on held-out images is given, and at the last of which are copies."""
    noise = np.exp(spread * np.random.default_rng(0).standard_normal(HELD_OUT))
    noise = noise / noise.mean()
    found = [
        Look(
            step=10 * (number + 1),
            views=10.0 * (number + 1),
            held_out=tuple(error * noise),
            seen=tuple(seen * noise),
        )
        for number, error in enumerate(errors)
    ]
    if copies:
        found[-1] = replace(
            found[-1], copies=Copies(count=copies, samples=50, real_count=0, real=50)
        )
    return found


@pytest.mark.parametrize(
    ("taken", "said"),
    [
        (looks(2.0, 1.5, 1.02), "49 images are enough for this network so far: after 30 views"),
        (looks(2.0, 1.0, 1.0, 1.0, 1.0), "enough for this network: after 50 views of each it does"),
        (looks(2.0, 1.5, 1.1), "it knows them only a little better than new ones (1.10 x ["),
        (
            looks(2.0, 1.5, 1.4),
            "too few for this network and budget: the error on new images is 1.4",
        ),
        (looks(2.0, 1.4, 1.8, 1.9), "too few for this network and budget: the error on new images"),
        (looks(2.0, 1.5, 1.0, copies=9), "too few for this network and budget: 9 of 50 samples"),
        (looks(2.0, 1.5), "too early to say whether 49 images are enough"),
        (looks(2.0, 1.5, 1.1, spread=0.9), "25 held-out images are too few to say whether 49"),
    ],
)
def test_the_verdict_says_after_training_whether_the_images_were_enough(
    taken: list[Look], said: str
) -> None:
    assert said in after_training(verdict(taken), 49)


def test_the_gain_by_twice_the_images_is_paired_over_held_out_images() -> None:
    rng = np.random.default_rng(1)
    hard = rng.uniform(0.5, 2.0, HELD_OUT)  # images differ far more than runs
    half = hard + 0.01 * rng.standard_normal(HELD_OUT)
    whole = 0.92 * hard + 0.01 * rng.standard_normal(HELD_OUT)

    def at(step: int, errors: np.ndarray) -> Look:
        return Look(step=step, views=float(step), held_out=tuple(errors), seen=tuple(errors))

    # the least error counts: neither the first look nor the last one
    halves = [at(1, half + 1), at(2, half), at(3, half + 0.3)]
    wholes = [at(1, whole + 1), at(4, whole), at(9, whole + 0.5)]
    found = HalfComparison.of(halves, wholes, images=(30, 60))
    expected = stats.ttest_1samp(half - whole, 0).confidence_interval(0.98)
    assert found.gain.mean == pytest.approx((half - whole).mean() / half.mean(), abs=1e-6)
    assert found.gain.low == pytest.approx(expected.low / half.mean(), abs=1e-6)
    assert found.gain.high == pytest.approx(expected.high / half.mean(), abs=1e-6)
    assert found.steps == (2, 4)
    unpaired = stats.ttest_ind(half, whole).confidence_interval(0.98)
    assert unpaired.low < 0 < found.gain.low  # what only pairing sees
    assert "60 images in place of 30 lowered the least error on unseen images by" in (
        found.sentence()
    )
    assert "]: more images would still help (the run on half and" in found.sentence()


@pytest.mark.parametrize(
    ("gain", "width", "held_out", "said"),
    [
        (0.08, 0.03, 25, "by 8.0 % [5.0, 11.0]: more images would still help"),
        (0.003, 0.007, 25, "by 0.3 % [-0.4, 1.0]: more images of the same kind would hardly help"),
        (0.015, 0.001, 25, "hardly help"),
        (0.03, 0.05, 25, "cannot be told"),
        (-0.05, 0.01, 25, "the run on all images is worse"),
        (0.08, 0.03, 11, "11 held-out images are too few"),
    ],
)
def test_the_conclusion_follows_from_the_interval(
    gain: float, width: float, held_out: int, said: str
) -> None:
    found = HalfComparison(
        gain=Estimate(gain, gain - width, gain + width),
        held_out=held_out,
        images=(30, 60),
        steps=(1, 1),
    )
    assert said in found.sentence()
    late = replace(found, unfinished=("whole",)).sentence()
    assert late.endswith(" (the run on all was still learning: longer trainings may differ)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run on half of the images, and one on all of them, for twice as long."""
    place, whole = tmp_path_factory.mktemp("runs"), tiny_run(folder, budget=Budget(steps=8))
    whole = replace(whole, data=replace(whole.data, holdout=0.35))
    half = replace(whole, name="half", data=replace(whole.data, half="first"))
    half = replace(half, budget=Budget(steps=4))
    return train(half, run=place / "half"), train(whole, run=place / "whole")


def test_halves_of_a_set_have_its_held_out_images_and_its_fingerprint(folder: Path) -> None:
    config = tiny_run(folder).data
    whole, first, second = (
        index(replace(config, half=half)) for half in ("off", "first", "second")
    )
    assert first.holdout.tolist() == second.holdout.tolist() == whole.holdout.tolist()
    assert sorted([*first.training, *second.training]) == whole.training.tolist()
    assert not set(first.clusters[first.training]) & set(first.clusters[second.training])
    assert first.epoch.tolist() == first.training.tolist()
    assert len({whole.fingerprint, first.fingerprint, second.fingerprint}) == 3
    assert {each.whole_fingerprint for each in (whole, first, second)} == {whole.fingerprint}
    elsewhere = index(replace(config, half="first", holdout=0.5))
    assert elsewhere.whole_fingerprint != whole.fingerprint


def test_a_run_on_half_says_whether_more_images_would_help(runs: tuple[Path, Path]) -> None:
    half, whole = runs
    report = write_report(whole).read_text()
    assert "images enough?" in report
    assert "Would more images help?" not in report
    assert "data.half=first" in report
    found = compare_with_half(whole, half)
    least = [
        min(
            (json.loads(line) for line in (run / "looks.jsonl").read_text().splitlines()),
            key=lambda look: np.mean(look["held_out"]),
        )
        for run in runs
    ]
    errors = [np.mean(look["held_out"]) for look in least]
    assert found.gain.mean == pytest.approx(1 - errors[1] / errors[0], abs=1e-6)
    assert found.images[1] in (2 * found.images[0], 2 * found.images[0] - 1)
    assert json.loads((whole / "half.json").read_text())["sentence"] == found.sentence()
    printed = cli.sfumato("report", whole, "--half", half).out.splitlines()
    assert printed == [found.sentence(), str(whole / "report.html")]
    assert found.sentence() in (whole / "report.html").read_text()
    assert found.sentence() in write_report(whole).read_text()  # it stays


def test_runs_that_differ_in_more_are_not_compared(
    runs: tuple[Path, Path], folder: Path, tmp_path: Path
) -> None:
    half, whole = runs
    with pytest.raises(RunError, match=r"data\.half=off, and data\.half=first"):
        compare_with_half(half, whole)
    other = tiny_run(folder)
    other = replace(other, data=replace(other.data, holdout=0.35))
    known = {"where": "half", "whole_path": "whole"}
    pair = replace(other, data=replace(other.data, half="second"))
    _require_alike(replace(pair, budget=Budget(steps=1), stop="overfitting"), other, **known)
    for change in ({"seed": 1}, {"batch_size": 3}, {"network": UNetConfig(channels=64)}):
        with pytest.raises(RunError, match=rf"more than data\.half: .*{next(iter(change))}"):
            _require_alike(replace(pair, **change), other, **known)
    latents = {"autoencoder": TrainedAutoencoder(network=KLConfig(channels=(16, 16), groups=4))}
    with pytest.raises(RunError, match="each with its own mean and scale"):
        _require_alike(replace(pair, **latents), replace(other, **latents), **known)
    edited = tmp_path / "edited"
    edited.mkdir()
    for name in ("config.yaml", "looks.jsonl"):
        (edited / name).write_bytes((half / name).read_bytes())
    record = json.loads((half / "data.json").read_text())
    (edited / "data.json").write_text(json.dumps({**record, "whole_fingerprint": "other"}))
    with pytest.raises(RunError, match="held-out images are not those of"):
        compare_with_half(whole, edited)


def test_another_half_cannot_be_resumed_with(runs: tuple[Path, Path]) -> None:
    half, _ = runs
    for value in ("second", "off"):
        with pytest.raises(CheckpointError, match=r"the split .*data\.half"):
            resume(half, overrides=[f"data.half={value}", "budget.steps=9"])


def test_the_source_of_a_set_does_not_matter_for_its_half(folder: Path) -> None:
    """A copy of the images elsewhere is the same set."""
    run = tiny_run(folder)
    moved = replace(run, data=replace(run.data, source=Folder("elsewhere"), half="first"))
    _require_alike(moved, run, where="half", whole_path="whole")
    other = replace(moved, seed=1)
    with pytest.raises(RunError, match=r"in more than data\.half: seed"):
        _require_alike(other, run, where="half", whole_path="whole")
