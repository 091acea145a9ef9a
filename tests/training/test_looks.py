"""Looks while a run trains: when they are taken, what they keep, and that a resumed run agrees."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import sfumato
from sfumato.data import AugmentConfig
from sfumato.diffusion import Linear
from sfumato.networks import UNetConfig
from sfumato.networks.perceptual import RandomFeatures
from sfumato.observability.metrics_file import read_lines
from sfumato.reporting import write_report
from sfumato.reporting.run_files import RunFiles
from sfumato.runs import prepare, resume, train
from sfumato.runs.training import build_trainer
from sfumato.storage import checkpoint
from sfumato.storage.run_directory import RunDirectory
from sfumato.training import (
    Budget,
    CheckpointConfig,
    MuonConfig,
    OptimizerConfig,
    PowerEMA,
    PreviewConfig,
    Trainer,
    ValidationConfig,
    evidence,
)
from sfumato.training.evidence import Look, error_ratio
from sfumato.training.looks import Looks
from sfumato.training.monitors import FEWEST_SEEN, LOOK_BINS, Validator
from sfumato.training.probe import Probe
from sfumato.training.stopping import verdict
from tests.helpers.runs import tiny_run

STEPS = 100


def digits(folder: Path) -> Path:
    """Forty handwritten digits in two categories."""
    for number, image in enumerate(load_digits().images[:40]):
        path = folder / ("even" if number % 2 == 0 else "odd") / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype(np.uint8)).save(path)
    return folder


def memorizing(folder: Path, **changes):
    """A run on half of forty digits, which it soon knows by heart."""
    run = tiny_run(folder)
    settings = {
        "data": replace(run.data, augment=AugmentConfig(), holdout=0.5),
        "network": UNetConfig(channels=32, multipliers=(1, 2), blocks=1, attention_depths=()),
        "optimizer": OptimizerConfig(
            learning_rate=4e-3, warmup_steps=5, schedule="constant", muon=MuonConfig()
        ),
        "ema": PowerEMA(0.1),
        "batch_size": 32,
        "micro_batch": None,
        "budget": Budget(steps=STEPS),
        "validation": ValidationConfig(every_steps=1000, samples=80, bins=4, copy_samples=0),
        "preview": PreviewConfig(every_steps=1000, num=2),
        "checkpoint": CheckpointConfig(every_steps=40),
    }
    return replace(run, **{**settings, **changes})


def looks_of(run: Path) -> list[Look]:
    return [Look.read(json.loads(line)) for line in (run / "looks.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def time_for_all_looks() -> Iterator[None]:
    """Looks go by views alone, however slow the machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sfumato.training.looks.FREE_S", 1e9)
        yield


@pytest.fixture(scope="module")
def whole(folder: Path, time_for_all_looks: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(memorizing(folder), run=tmp_path_factory.mktemp("runs") / "whole")


def test_a_run_that_memorizes_noise_is_told_to_stop_and_its_best_weights_are_used(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = looks_of(whole)
    found = json.loads((whole / "best" / "verdict.json").read_text())
    assert found["state"] == "overfitting"
    assert found == json.loads((whole / "status.json").read_text())["verdict"]
    assert found["sentence"] == verdict(looks).sentence
    assert found["best_step"] < looks[-1].step
    kept = checkpoint.load_snapshot(whole / "best", step=found["best_step"])
    network = sfumato.load(whole).model.state_dict()
    assert all(torch.equal(network[name], kept[name]) for name in kept)
    assert f"weights of step {found['best_step']}: stop: the model overfits" in (
        capsys.readouterr().err
    )
    last = sfumato.load(whole, weights="ema").model.state_dict()
    assert any(not torch.equal(last[name], kept[name]) for name in kept)


def test_looks_at_other_data_are_compared_with_none_before(
    tmp_path: Path, time_for_all_looks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    place = digits(tmp_path / "images")
    run = train(memorizing(place, stop="overfitting"), run=tmp_path / "run")
    before = looks_of(run)
    stopped = before[-1].step
    assert stopped < STEPS
    capsys.readouterr()
    assert resume(run) == run
    said = capsys.readouterr().err
    assert f"stopped already, at step {stopped}, as overfitting; to go on all the same" in said
    for number, image in enumerate(load_digits().images[100:130]):  # more are held out, too
        path = place / ("even" if number % 2 == 0 else "odd") / f"more{number:03d}.png"
        Image.fromarray((image * 15.9).astype(np.uint8)).save(path)
    goal = stopped + 60
    resume(run, overrides=[f"budget.steps={goal}", "stop=never"], accepts_data=True)
    looks = looks_of(run)
    assert looks[: len(before)] == before
    since = RunFiles(run).looks
    assert since == looks[len(before) :]
    assert {look.begins for look in since} == {stopped}
    assert RunDirectory.existing(run).data_record()["begins"] == stopped
    lines = read_lines(run / "looks.jsonl")[: len(before)]
    assert evidence.looks_of(lines, {"begins": stopped}) == []  # before the first look
    assert evidence.looks_of(lines, {}) == before  # of versions before
    assert since[0].views <= 2  # of the images as they are now
    found = json.loads((run / "best" / "verdict.json").read_text())
    assert found["best_step"] in {look.step for look in since}
    assert found["sentence"] == verdict(since).sentence
    assert write_report(run).exists()
    resume(run, overrides=[f"budget.steps={goal + 5}", "stop=never"])
    assert looks_of(run)[len(before) :][: len(since)] == since


def test_looks_are_spaced_by_views(whole: Path) -> None:
    views = [look.views for look in looks_of(whole)]
    assert views[0] <= 2
    assert len(views) > 8
    gaps = [later / before for before, later in itertools.pairwise(views[3:-1])]
    assert all(1.1 < gap < 2.1 for gap in gaps)


def test_a_stopped_run_that_goes_on_gives_the_same_looks_and_verdict(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfumato.training.trainer import Trainer

    step = Trainer.train_step

    def interrupted(self: Trainer, batch):
        if self.state.counters.step == 77:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(memorizing(folder), run=tmp_path / "run")
    monkeypatch.setattr(Trainer, "train_step", step)
    before = looks_of(tmp_path / "run")
    newest = checkpoint.load(checkpoint.paths(tmp_path / "run" / "checkpoints")[0])
    assert before[-1].step > newest.state["counters"]["step"]  # a look is taken again
    resume(tmp_path / "run")
    assert (tmp_path / "run" / "looks.jsonl").read_text() == (whole / "looks.jsonl").read_text()
    for name in ("best/verdict.json",):
        assert json.loads((tmp_path / "run" / name).read_text()) == json.loads(
            (whole / name).read_text()
        )


def views_of_looks(look_s: float, *, memorizes_from: float, begins: int = 0) -> list[float]:
    """Return when looks are taken in a run of 500 views and 800 seconds, of which looks may take 36,
    their errors 21.6; from a step on, with other data, after six looks before.
    """
    hook, taken = Looks(None, None, None), []
    hook._before = 6 if begins else 0
    counters = SimpleNamespace(step=0, seconds=0.0, looks_s=0.0)
    for number in range(begins + 1, 5001):
        views, progress = number / 10, number / 5000
        counters.step, counters.seconds = number, 800 * progress
        trainer = SimpleNamespace(
            views=views - begins / 10,
            epochs=views,
            plan=SimpleNamespace(begins=begins),
            progress=progress,
            state=SimpleNamespace(counters=counters),
            config=SimpleNamespace(validation=None),
            timetable=SimpleNamespace(due=lambda name, cadence: False),
        )
        hook._looks, hook._state = taken, "learning"
        if hook.due(trainer, finished=False):
            ratio = 1.2 if views > memorizes_from else 1.0
            taken.append(Look(step=number, views=trainer.views, held_out=(ratio,), seen=(1.0,)))
            hook._errors_s.append(look_s)
            counters.looks_s += look_s
    return [look.views for look in taken]


@pytest.mark.parametrize("look_s", [1.0, 2.0])
def test_looks_at_other_data_are_spread_over_what_is_left(
    look_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfumato.training.looks.FREE_S", 10.0)
    views = views_of_looks(look_s, memorizes_from=math.inf, begins=2500)
    assert 0 < views[0] <= 1.1
    gaps = [late / soon for soon, late in itertools.pairwise([*views, 250.0])]
    assert max(gaps) < 2.6


@pytest.mark.parametrize("look_s", [0.3, 1.0, 1.5])
def test_looks_are_dense_while_the_model_memorizes_and_keep_within_their_time(
    look_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfumato.training.looks.FREE_S", 10.0)
    views = views_of_looks(look_s, memorizes_from=60.0)
    assert (len(views) + 1) * look_s <= 0.6 * 0.045 * 800  # the last one is taken at the end
    evenly = views_of_looks(look_s, memorizes_from=math.inf)
    inside = [sum(60 < each < 240 for each in marks) for marks in (views, evenly)]
    assert inside[0] > inside[1] or look_s == 0.3
    watched = [each for each in views if each > 60]
    assert max(late / soon for soon, late in itertools.pairwise(watched[:4])) < 1.5


@pytest.mark.parametrize(("look_s", "looks"), [(0.01, 28), (1.7, 13), (60.0, 8)])
def test_looks_are_spread_over_the_run_where_they_take_long(
    look_s: float, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfumato.training.looks.FREE_S", 10.0)
    views = views_of_looks(look_s, memorizes_from=math.inf)
    assert looks - 4 <= len(views) <= looks
    assert views[0] == 1
    assert views[-1] > 200
    assert max(late / soon for soon, late in itertools.pairwise(views)) < 3.2


@pytest.mark.slow
def test_a_run_may_stop_at_its_verdict_and_go_on_later(
    folder: Path, time_for_all_looks: None, tmp_path: Path
) -> None:
    run = train(memorizing(folder, stop="overfitting"), run=tmp_path / "run")
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "finished"
    assert status["verdict"]["state"] == "overfitting"
    assert status["step"] < STEPS
    resume(run, overrides=["stop=never"])
    assert json.loads((run / "status.json").read_text())["step"] == STEPS


def test_the_report_answers_from_the_files_alone(whole: Path) -> None:
    page = (whole / "report.html").read_text()
    assert "Stop: it overfits" in page
    assert "The model overfits; best at step" in page or "the model overfits; best at step" in page
    assert page.count("<svg") >= 2
    assert "http" not in page.replace("http-equiv", "")  # nothing is loaded from elsewhere
    assert len(page) < 5 << 20


def test_runs_of_earlier_versions_have_a_report_too(whole: Path, tmp_path: Path) -> None:
    """They have neither looks nor a skill."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "looks.jsonl").unlink()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("validation/ema/skill", None)
        for row in line.get("validation/ema/bins", ()):
            del row["skill"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "<h2>By noise level</h2>" in write_report(run).read_text()


def test_samples_are_measured_beside_real_images(
    folder: Path, time_for_all_looks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfumato.evaluation.sample_meter.extractor", lambda name: RandomFeatures())
    settings = memorizing(folder, budget=Budget(steps=24))
    validation = replace(settings.validation, copy_samples=30)
    run = train(replace(settings, validation=validation), run=tmp_path / "run")
    sampled = [look for look in looks_of(run) if look.copies is not None]
    assert len(sampled) > 1
    assert all(look.samples["kid_held_out"]["n"] == look.copies.samples for look in sampled)
    page = write_report(run).read_text()
    assert "<h2>Samples beside real images</h2>" in page
    assert f"(C_T {sampled[-1].samples['distance_test']['value']:+.1f}" in page
    looks = [json.loads(line) for line in (run / "looks.jsonl").read_text().splitlines()]
    for look in looks:
        del look["samples"]  # as earlier versions wrote it
    (run / "looks.jsonl").write_text("".join(json.dumps(look) + "\n" for look in looks))
    assert "C_T" not in write_report(run).read_text().split("<h2>Words</h2>")[0]


def trainer_of(folder: Path, place: Path, **validation) -> Trainer:
    settings = memorizing(folder)
    changed = replace(settings.validation, **validation)
    return build_trainer(prepare(replace(settings, validation=changed)), RunDirectory.create(place))


def test_a_look_is_a_validation_of_at_most_five_levels(folder: Path, tmp_path: Path) -> None:
    for bins in (4, 5):  # the same images at the same levels
        trainer = trainer_of(folder, tmp_path / str(bins), bins=bins, samples=30 * bins)
        average = trainer.state.average
        held_out, seen = trainer.task.validator.look_errors(average)
        assert held_out.eps_square.shape == (20, bins)
        figures = trainer.validate()
        assert float(held_out.eps_square.mean()) == figures["validation/ema/eps_mse"]
        ratio = error_ratio(held_out.by_image(), seen.by_image(), level=0.95)
        assert ratio.mean == pytest.approx(figures["validation/ratio/mean"], abs=1e-12)
    trainer = trainer_of(folder, tmp_path / "ten", bins=10, samples=500)
    held_out, seen = trainer.task.validator.look_errors(trainer.state.average)
    assert held_out.eps_square.shape[1] == seen.eps_square.shape[1] == LOOK_BINS


@pytest.mark.parametrize(("held_out", "seen"), [(6, 25), (20, 25), (30, 30), (40, 34)])
def test_a_look_meets_as_many_training_as_held_out_images(held_out: int, seen: int) -> None:
    x0 = torch.randn(34, 1, 2, 2)
    probe = Probe(x0=x0, weights=None, context={"category": torch.arange(34)})
    settings = {"schedule": Linear(), "seed": 1, "bins": 5, "most": 50}
    chosen = probe.triples(max(FEWEST_SEEN, held_out), **settings)
    assert torch.equal(chosen.triples.x0, x0[:seen])
    assert chosen.context["category"].tolist() == list(range(seen))
    few = probe.triples(2, **settings).triples
    assert len(few) == 2 * 5 * 13  # at least 25 noises a level


def test_looks_meet_fewer_images_where_predictions_are_slow(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sfumato.training.looks.FREE_S", 60.0)
    monkeypatch.setattr(Validator, "prediction_s", lambda self, model: 0.03)
    run = train(memorizing(folder, budget=Budget(steps=12)), run=tmp_path / "run")
    assert {(len(look.held_out), len(look.seen)) for look in looks_of(run)} == {(15, 15)}
    assert "looks meet 15 of 20 held-out images" in capsys.readouterr().err
    monkeypatch.setattr(Validator, "prediction_s", lambda self, model: 1e-9)
    resume(run, overrides=["budget.steps=16"])
    assert {(len(look.held_out), len(look.seen)) for look in looks_of(run)} == {(15, 15)}
    assert len(looks_of(run)) > 4


def test_errors_on_fewer_images_are_the_same(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(folder, tmp_path / "run", bins=5, samples=200)
    validator, average = trainer.task.validator, trainer.state.average
    whole = validator.look_errors(average)
    validator.look_images = 12
    assert len(validator.look_triples) == 12 * 5 * 2  # two noises a level, as before
    for few, all_of_them in zip(validator.look_errors(average), whole, strict=True):
        torch.testing.assert_close(few.eps_square, all_of_them.eps_square[:12])
