"""The sweep of a run: when it happens, what it draws, and who uses what it recommends."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sfumato
from sfumato.contexts import ContextConfig
from sfumato.errors import RunError
from sfumato.evaluation.classifier import train_classifier
from sfumato.evaluation.sweep_plan import Plan
from sfumato.evaluation.sweep_result import Setting
from sfumato.generation.diffusion_model import SamplingConfig
from sfumato.generation.request import ResolvedRequest
from sfumato.networks.perceptual import RandomFeatures
from sfumato.recipes import Run, resolve
from sfumato.reporting import write_report
from sfumato.runs import resume, train
from sfumato.runs.loading import load_own
from sfumato.runs.sweep import SEED, _Drawing, sweep_run
from sfumato.storage.run_directory import RunDirectory
from sfumato.training import Budget, PostHocEMAConfig, PowerEMA, SweepConfig
from tests.helpers.cli import sfumato as program
from tests.helpers.runs import fingerprint, images, tiny_run

OWN = {"weights": "ema", "guidance": 2.0, "steps": 4}
ADVICE = {**OWN, "guidance": 1.5, "steps": 3}
SAID = "by default guidance 1.5 instead of 2, 3 steps instead of 4 (sfumato sweep: measured)"


def small(folder: Path, **changes) -> Run:
    settings = tiny_run(
        folder,
        budget=Budget(steps=2),
        sampling=SamplingConfig(guidance=2.0, steps=4),
        ema=PowerEMA(0.1),
        post_hoc_ema=PostHocEMAConfig(widths=(0.1, 0.25), num=2),
    )
    return replace(settings, data=replace(settings.data, holdout=0.4), **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(small(folder), run=tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few samples, and small networks to judge them."""
    monkeypatch.setattr("sfumato.evaluation.sweep.plans", lambda grid: [Plan(grid, 8, 12)])
    monkeypatch.setattr("sfumato.evaluation.sweep.PROBES", (2, 8))
    monkeypatch.setattr("sfumato.evaluation.sweep_judge.RESAMPLES", 50)
    monkeypatch.setattr("sfumato.runs.sweep.extractor", lambda name: RandomFeatures())
    monkeypatch.setattr(
        "sfumato.evaluation.report.train_classifier", functools.partial(train_classifier, steps=3)
    )


@pytest.fixture
def swept(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Sweeps that are only noted."""
    calls: list[Path] = []

    def note(path: Path, **settings: object) -> None:
        calls.append(path)
        raise RunError("noted", where="here", hint="-")

    monkeypatch.setattr("sfumato.runs.sweep.sweep_run", note)
    return calls


def advise(run: Path, recommended: dict | None = ADVICE, *, step: int = 2) -> None:
    (run / "sweep.json").write_text(
        json.dumps(
            {"step": step, "own": OWN, "recommended": recommended, "reason": "measured", "rows": []}
        )
    )


def test_the_command_compares_writes_and_reports_and_leaves_the_training(
    run: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(run)
    monkeypatch.setattr("sfumato.runs.sweep.WIDTHS", (0.1, 0.2))
    result = program("sweep", run, "--minutes", 5, "--json")
    assert result.code == 0, result.err
    plain = json.loads(result.out)
    assert plain == json.loads((run / "sweep.json").read_text())
    assert plain["own"] == OWN
    assert plain["step"] == 2
    found = [tuple(row["setting"].values()) for row in plain["rows"]]
    assert len(found) == len(set(found)) == 2 * 4 * 2
    assert {weights for weights, _, _ in found} == {"ema", 0.2}  # its own width is 0.1
    assert {guidance for _, guidance, _ in found} == {1.0, 1.5, 2.0, 3.0}
    assert {steps for _, _, steps in found} == {4, 2}
    assert all(row["category_accuracy"]["n"] == row["kid"]["n"] for row in plain["rows"])
    assert fingerprint(run) == before
    page = write_report(run).read_text()
    assert "<h2>Settings of sampling</h2>" in page
    assert page.count("samples</small>") == len(found) + len(plain["final"])


def test_samples_are_those_of_the_pipeline_whatever_was_drawn_before(run: Path) -> None:
    """Image i is image i of a seed, in any range, under its setting and weights."""
    pipeline, directory = load_own(RunDirectory(run)), RunDirectory(run)
    context = {"category": torch.arange(12) % 2}
    request = ResolvedRequest.of(context, pipeline.image_shape, 12)
    draw = _Drawing(
        pipeline=pipeline, directory=directory, request=request, own="ema", stop=lambda: None
    )
    for weights in ("ema", 0.2, "ema"):
        other = sfumato.load(run, weights=weights)
        options = {"seed": SEED, "guidance": 1.5, "steps": 3}
        whole = other.sample(12, category=["even", "odd"], **options)
        setting = Setting(weights=weights, guidance=1.5, steps=3)
        parts = [draw(setting, numbers) for numbers in (range(7), range(7, 12))]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-5)


def test_few_held_out_images_are_refused_before_anything_is_sampled(
    folder: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*arguments: object, **options: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("sfumato.runs.sweep.load_own", work)
    monkeypatch.setattr("sfumato.runs.sweep.MIN_RELIABLE_HOLDOUT_IMAGES", 100)
    result = program("sweep", run)
    assert result.code == 2
    assert "held-out images are too few to compare settings of sampling (100 are needed)" in (
        result.err
    )


@pytest.mark.parametrize("conditioner", [ContextConfig(), None])
def test_a_model_that_cannot_be_guided_is_compared_by_steps_alone(
    conditioner: ContextConfig | None, folder: Path, quick: None, tmp_path: Path
) -> None:
    """One without conditions, and one whose unconditional prediction was never trained."""
    usual = small(folder)
    never = replace(usual.conditioner, category=replace(usual.conditioner.category, dropout=0.0))
    settings = replace(
        usual, conditioner=conditioner or never, sampling=SamplingConfig(guidance=1.0, steps=4)
    )
    path = train(replace(settings, post_hoc_ema=PostHocEMAConfig()), run=tmp_path / "run")
    result = sweep_run(path, minutes=5)
    assert result.table().endswith(result.sentence)
    rows = result.rows
    assert {(row.setting.guidance, row.setting.steps) for row in rows} == {(1.0, 4), (1.0, 2)}


def test_a_run_sweeps_once_when_it_has_trained(
    folder: Path, swept: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = train(small(folder, sweep=SweepConfig(minutes=1)), run=tmp_path / "run")
    assert swept == [path]
    assert "noted; -\nreport: " in capsys.readouterr().err
    assert json.loads((path / "status.json").read_text())["state"] == "finished"
    resume(path)
    assert swept == [path]  # finished already
    advise(path)
    resume(path, overrides=["budget.steps=3"])
    assert swept == [path, path]  # of other weights
    advise(path, step=4)
    resume(path, overrides=["budget.steps=4"])
    assert swept == [path, path]


def test_a_short_training_sweeps_only_if_it_is_told_to(
    folder: Path, swept: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = train(small(folder), run=tmp_path / "null")
    assert f"is too short; `sfumato sweep {path}` does it" in capsys.readouterr().err
    train(small(folder, sweep=SweepConfig(minutes=0)), run=tmp_path / "off")
    assert "sfumato sweep" not in capsys.readouterr().err
    assert swept == []


def interrupted(*arguments: object, stop: Callable[[], object], **options: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    stop()
    raise AssertionError("goes on after the signal")


def broken(*arguments: object, **options: object) -> None:
    raise ZeroDivisionError("a fault")


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (interrupted, "SIGTERM: settings of sampling are not compared; the run is finished"),
        (broken, "warning: settings of sampling are not compared: a fault"),
    ],
)
def test_what_happens_in_a_sweep_does_not_touch_the_finished_run(
    work: Callable[..., None],
    said: str,
    folder: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sfumato.runs.sweep.sweep_run", work)
    path = train(small(folder, sweep=SweepConfig(minutes=1)), run=tmp_path / "run")
    assert said in capsys.readouterr().err
    assert json.loads((path / "status.json").read_text())["state"] == "finished"
    assert (path / "report.html").is_file()
    assert not (path / "sweep.json").exists()
    assert fingerprint(path) == fingerprint(trained)


def test_sampling_uses_the_recommendation_and_says_so_and_options_win(run: Path) -> None:
    advise(run)
    assert (sfumato.load(run).sampling.guidance, sfumato.load(run).sampling.steps) == (1.5, 3)
    plain = program("sample", run, "--num", 1, "--json")
    assert SAID in plain.err
    settings = json.loads(plain.out)["settings"]
    assert (settings["guidance"], settings["steps"], settings["weights"]) == (1.5, 3, "ema")
    settings = json.loads(program("sample", run, "--num", 1, "--steps", 5, "--json").out)[
        "settings"
    ]
    assert (settings["guidance"], settings["steps"]) == (1.5, 5)
    settings = json.loads(
        program("sample", run, "--guidance", 4, "--category", "odd", "--json").out
    )["settings"]
    assert (settings["guidance"], settings["steps"]) == (4.0, 3)
    raw = program("sample", run, "--num", 1, "--weights", "raw", "--json")
    assert SAID not in raw.err
    assert json.loads(raw.out)["settings"]["guidance"] == 2.0


def test_a_recommended_average_is_used(run: Path) -> None:
    advise(run, {**ADVICE, "weights": 0.2})
    weights = sfumato.load(run).model.state_dict()
    wanted = sfumato.load(run, weights=0.2).model.state_dict()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    assert any(
        not torch.equal(tensor, wanted[name])
        for name, tensor in sfumato.load(run, weights="ema").model.state_dict().items()
    )
    assert sfumato.load(run, weights="ema").sampling.guidance == 2.0
    settings = json.loads(program("sample", run, "--num", 1, "--json").out)["settings"]
    assert (settings["weights"], settings["guidance"]) == ("0.2", 1.5)


def test_a_sweep_of_other_weights_or_settings_is_not_used_and_that_is_said(run: Path) -> None:
    advise(run, step=1)
    result = program("sample", run, "--num", 1, "--json")
    assert "sweep.json is not used: it is of other weights or settings" in result.err
    assert json.loads(result.out)["settings"]["guidance"] == 2.0
    advise(run, None)
    assert "sfumato sweep" not in program("sample", run, "--num", 1, "--json").err


def test_exports_carry_the_recommendation(run: Path, tmp_path: Path) -> None:
    advise(run)
    assert program("export", run, "--format", "bundle", "--out", tmp_path / "out").code == 0
    sampling = resolve(tmp_path / "out").sampling
    assert (sampling.guidance, sampling.steps) == (1.5, 3)
    assert "3 steps, guidance 1.5" in (tmp_path / "out" / "README.md").read_text()
