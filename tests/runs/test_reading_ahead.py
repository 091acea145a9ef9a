"""`data.limit`, an even sample, and `data.wait=ready`: training that begins with one, and goes on with
more images.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sfumato
from sfumato.data import DataConfig, Folder, index
from sfumato.data.index_store import KeyStore
from sfumato.data.indexing import sample
from sfumato.errors import ConfigError
from sfumato.recipes import Run
from sfumato.recipes.resolver import resolve
from sfumato.runs import reading_ahead, resume, train, training
from sfumato.runs.preparation import open_data
from sfumato.storage.run_directory import RunDirectory
from sfumato.training import Budget
from tests.helpers.runs import fingerprint, tiny_run


@pytest.mark.parametrize("count", [1, 2, 7, 1000, 100_003])
def test_a_larger_sample_holds_a_smaller_one(count: int) -> None:
    before: set[int] = set()
    for limit in sorted({1, 2, count // 7 or 1, count // 2 or 1, count - 1 or 1}):
        found = sample(count, limit)
        assert len(found) == min(limit, count)
        assert (np.diff(found) > 0).all()
        assert before <= set(found.tolist())
        before = set(found.tolist())
    for limit in (0, count, count + 5):
        assert sample(count, limit).tolist() == list(range(count))


def test_a_sample_is_even() -> None:
    """In 100 stretches of a listing, as many as chance puts there; a regular one is in each alike."""
    places = np.bincount(sample(1_000_000, 10_000) // 10_000, minlength=100)
    assert abs(places.std() / 10 - 1) < 0.3  # a Poisson distribution of 100 in each
    assert (np.bincount(np.arange(0, 1_000_000, 100) // 10_000)).std() == 0
    residues = np.bincount(sample(1_000_000, 10_000) % 7, minlength=7)
    assert ((residues - 10_000 / 7) ** 2 / (10_000 / 7)).sum() < 22.5  # p = 0.001


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("images")
    for number in range(400):
        category = place / f"c{number * 4 // 400}"  # sorted, as a folder lists them
        category.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8), np.uint8)
        Image.fromarray(pixels).save(category / f"{number:03d}.png")
    return place


def test_a_sample_knows_all_categories_and_keeps_account_of_the_rest(folder: Path) -> None:
    config = DataConfig(source=Folder(str(folder)), resolution=8, channels=1)
    whole, part = index(config), index(replace(config, limit=3, holdout=0.0))
    assert part.categories == whole.categories == ("c0", "c1", "c2", "c3")
    assert len(part.entries) == 3
    assert part.ledger.balanced
    assert part.ledger.beyond == 397
    assert "400 files: 3 images used, 397 beyond data.limit" in part.ledger.line()
    assert part.ledger.plain()["beyond_limit"] == 397
    names = {
        entry.name: int(label) for entry, label in zip(whole.entries, whole.labels, strict=True)
    }
    assert all(
        names[entry.name] == int(label)
        for entry, label in zip(part.entries, part.labels, strict=True)
    )


def growing(folder: Path, **changes: object) -> Run:
    run = tiny_run(folder, **{"budget": Budget(steps=60), **changes})
    return replace(run, data=replace(run.data, wait="ready"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_ahead, "FIRST", 40)


def slowed(monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    """Let training wait for the process that reads, after some steps of each trainer."""
    from sfumato.training.trainer import Trainer

    step = Trainer.train_step

    def waiting(self: Trainer, batch: object) -> object:
        first = self.__dict__.setdefault("first_step", self.state.counters.step)
        reads = self._pauses.__name__ == "is_done"  # by a process
        if reads and self.state.counters.step - first == after:
            deadline = time.monotonic() + 60
            while not self._pauses() and len(self.dataset.entries) < 400:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        return step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", waiting)


def test_training_begins_with_a_sample_and_goes_on_with_more(
    folder: Path, small: None, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slowed(monkeypatch, after=4)
    run = train(growing(folder), run=tmp_path / "run")
    said = capsys.readouterr().err
    assert "training begins with 40 of 400 images, an even sample" in said
    assert "changed on resume: data.limit: 40 -> 160" in said
    assert "changed on resume: data.limit: 160 -> 0" in said
    assert "trained with" not in said
    record = RunDirectory(run).data_record()
    assert record["images"] == 400
    assert [row["images"] for row in record["seen"]] == [40, 160, 400]
    assert [row["step"] for row in record["seen"]] == [0, 5, 10]
    settings = resolve(run).data
    assert (settings.limit, settings.wait) == (0, "ready")
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 61))
    assert "step 0: 40; step 5: 160; step 10: 400" in (run / "report.html").read_text()
    assert "400 files: 160 images used, 240 beyond" in (run / "reading.log").read_text()
    # and goes on, as one that had all images from the step on at which it got them
    resume(run, overrides=["budget.steps=62"])
    assert "beyond" not in open_data(resolve(run)).ledger.line()


class Crash(BaseException):
    """The process is gone."""


@pytest.mark.slow
def test_the_same_call_goes_on_with_what_the_run_has_grown_to(
    folder: Path, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler repeats its command, the first limit with it."""
    overrides = ["data.wait=ready", "data.limit=50", "budget.steps=30"]
    settings = tiny_run(folder)
    with monkeypatch.context() as patch:
        slowed(patch, after=2)
        sfumato.train(settings, overrides=overrides, run=tmp_path / "run", resumes=True)
    again = [*overrides[:2], "budget.steps=34"]
    sfumato.train(settings, overrides=again, run=tmp_path / "run", resumes=True)
    record = RunDirectory(tmp_path / "run").data_record()
    assert [row["images"] for row in record["seen"]] == [50, 400]


@pytest.mark.parametrize(
    "moment",
    [pytest.param("before it is described", marks=pytest.mark.slow), "after it is described"],
)
def test_a_run_that_dies_as_it_grows_goes_on(
    moment: str, folder: Path, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfumato.training.saving import RunSaver

    monkeypatch.setattr(reading_ahead, "FIRST", 110)
    with monkeypatch.context() as patch:
        slowed(patch, after=2)
        describe = training._write_description
        save = RunSaver.save_now

        def gone(self: RunSaver, **_: bool) -> None:
            raise Crash

        def dying(prepared, directory, *, begins):
            if begins and moment.startswith("before"):
                raise Crash
            describe(prepared, directory, begins=begins)
            if begins:  # the checkpoint of the larger set is never written
                patch.setattr(RunSaver, "save_now", gone)

        patch.setattr(training, "_write_description", dying)
        with pytest.raises(Crash):
            train(growing(folder, budget=Budget(steps=12)), run=tmp_path / "run")
        patch.setattr(RunSaver, "save_now", save)
    resume(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"


def stopped_at_step_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the verdict of a run be to stop."""
    from sfumato.training.trainer import Trainer

    step = Trainer.train_step

    def stopping(self: Trainer, batch: object) -> object:
        result = step(self, batch)
        if self.state.counters.step == 3:
            self.state.counters.stopped = "overfitting"
        return result

    monkeypatch.setattr(Trainer, "train_step", stopping)


def test_a_run_that_stopped_waits_for_more_images(
    folder: Path, small: None, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sfumato.process.signals import Interrupted

    stopped_at_step_3(monkeypatch)
    settings = growing(folder, budget=Budget(steps=12), stop="overfitting")
    with monkeypatch.context() as patch:  # a signal while it waits
        patch.setattr(
            reading_ahead.ReadingAhead, "wait", lambda self: (_ for _ in ()).throw(Interrupted(15))
        )
        with pytest.raises(Interrupted):
            train(settings, run=tmp_path / "run")
    said = capsys.readouterr().err
    assert "stopped, as overfitting: the run goes on when more images are read" in said
    assert "goes on from there" in said
    resume(tmp_path / "run")
    record = RunDirectory(tmp_path / "run").data_record()
    assert [row["step"] for row in record["seen"]][:2] == [0, 3]
    assert [row["images"] for row in record["seen"]][:2] == [40, 160]
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 12)


def test_a_verdict_at_the_end_of_the_budget_waits_for_nothing(
    folder: Path, small: None, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped_at_step_3(monkeypatch)
    train(growing(folder, budget=Budget(steps=3), stop="overfitting"), run=tmp_path / "run")
    said = capsys.readouterr().err
    assert "when more images are read" not in said
    assert "trained with 40 of 400 images" in said


def test_a_checkpoint_that_cannot_be_written_is_not_tried_at_each_step(
    folder: Path, small: None, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sfumato.errors import CheckpointError
    from sfumato.training.saving import RunSaver

    slowed(monkeypatch, after=2)
    save, calls = RunSaver.save_now, []

    def full(self: RunSaver, **_: bool) -> None:
        if self.trainer.state.counters.step:
            calls.append(self.trainer.state.counters.step)
            raise CheckpointError("no space left")
        save(self)

    monkeypatch.setattr(RunSaver, "save_now", full)
    train(growing(folder, budget=Budget(steps=12)), run=tmp_path / "run")
    assert calls == [3]
    assert "no space left" in capsys.readouterr().err


def test_a_sample_leaves_what_is_known_of_the_other_images(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("sfumato.data.index_store.SLOW_S", 0.0)
    config = DataConfig(source=Folder(str(folder)), resolution=8, channels=1)

    def known() -> int:
        stored = KeyStore(config.source).load()
        return len({number for each in stored for number in each.column("identity").tolist()})

    index(config)
    assert known() == 400
    index(replace(config, limit=40, holdout=0.2))
    assert known() == 400


def test_a_limit_concerns_no_other_source(folder: Path) -> None:
    config = DataConfig(source=Folder(str(folder)), limit=3, wait="ready", channels=1)
    other = config.of_other(Folder("elsewhere"))
    assert (other.limit, other.wait, other.channels) == (0, "all", 1)
    assert other.source == Folder("elsewhere")


def test_excluded_categories_are_none_of_a_sample(folder: Path, tmp_path: Path) -> None:
    names = [f"c3/{number:03d}.png" for number in range(300, 400)]
    (tmp_path / "exclude.txt").write_text("\n".join(names))
    config = DataConfig(
        source=Folder(str(folder)), resolution=8, channels=1, exclude=str(tmp_path / "exclude.txt")
    )
    assert index(replace(config, limit=30)).categories == index(config).categories
    assert index(config).categories == ("c0", "c1", "c2")


def test_a_run_that_ends_before_all_is_read_says_so(
    folder: Path, small: None, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = reading_ahead.subprocess.Popen
    started = []

    def never(command: list[str], **options: object) -> object:
        started.append(begin(["sleep", "600"], **options))
        return started[-1]

    monkeypatch.setattr(reading_ahead.subprocess, "Popen", never)
    run = train(growing(folder, budget=Budget(steps=3)), run=tmp_path / "run")
    assert "trained with 40 of 400 images, an even sample" in capsys.readouterr().err
    assert started[0].returncode is not None  # it was ended with the training
    # a limit by itself is the same training
    settings = growing(folder, budget=Budget(steps=3))
    fixed = replace(settings, data=replace(settings.data, wait="all", limit=40))
    assert fingerprint(train(fixed, run=tmp_path / "fixed")) == fingerprint(run)


def test_a_reading_process_that_fails_is_said_and_training_goes_on(
    folder: Path, small: None, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = reading_ahead.subprocess.Popen

    def failing(command: list[str], **options: object) -> object:
        process = begin(["false"], **options)
        process.wait()
        return process

    monkeypatch.setattr(reading_ahead.subprocess, "Popen", failing)
    train(growing(folder, budget=Budget(steps=3)), run=tmp_path / "run")
    said = capsys.readouterr().err
    assert said.count("warning: no more images could be read; see") == 1
    assert "trained with 40 of 400 images" in said


@pytest.mark.parametrize(
    "problem",
    [
        ConfigError("does not fit", where="data", hint="none"),
        pytest.param(OSError("no space left"), marks=pytest.mark.slow),
    ],
)
def test_images_that_do_not_fit_the_model_are_left_out_and_training_goes_on(
    problem: Exception,
    folder: Path,
    small: None,
    tmp_path: Path,
    monkeypatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    slowed(monkeypatch, after=2)
    monkeypatch.setattr(reading_ahead, "FIRST", 110)  # all are next
    restore = training._restore_trainer

    def refusing(directory, overrides, **options):
        if options.get("limit") is not None:
            raise problem
        return restore(directory, overrides, **options)

    monkeypatch.setattr(training, "_restore_trainer", refusing)
    run = train(growing(folder, budget=Budget(steps=6)), run=tmp_path / "run")
    said = capsys.readouterr().err
    assert "warning: the run goes on without more images: " in said
    assert "trained with 110 of 400 images" in said
    assert (resolve(run).data.wait, resolve(run).data.limit) == ("ready", 110)
    monkeypatch.setattr(training, "_restore_trainer", restore)
    resume(run, overrides=["budget.steps=20"])  # what was wrong may have passed
    assert resolve(run).data.limit == 0


def test_few_images_are_all_read_first(folder: Path, tmp_path: Path) -> None:
    run = train(growing(folder, budget=Budget(steps=2)), run=tmp_path / "run")
    assert RunDirectory(run).data_record()["images"] == 400
    assert not (run / "reading.log").exists()


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("budget.epochs=2", "budget.epochs"),
        ("data.cache=off", "data.cache"),
        ("conditioner.attributes.size=8", "conditioner.attributes"),
        ("autoencoder.kind=trained", "autoencoder"),
    ],
)
def test_what_cannot_grow_is_refused_before_work(
    folder: Path, tmp_path: Path, override: str, where: str
) -> None:
    with pytest.raises(ConfigError, match=r"data\.wait=ready cannot be used where") as caught:
        sfumato.train(
            str(folder),
            overrides=["data.wait=ready", "data.resolution=8", override],
            run=tmp_path / "run",
        )
    assert caught.value.where == where
    assert not (tmp_path / "run").exists()
