"""What the system refuses is said in a person's words, by every verb: nobody is asked to report a
full disk.
"""

import errno
import functools
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sfumato.cli.main import app
from sfumato.cli.system_errors import REASONS, in_words
from sfumato.data import Dataset
from sfumato.data.remote import limit_bytes
from sfumato.errors import DataError, RunError
from sfumato.evaluation.classifier import train_classifier
from sfumato.generation.diffusion_model import SamplingConfig
from sfumato.recipes import Run
from sfumato.runs import train
from sfumato.runs.preparation import open_data
from sfumato.storage import run_directory
from sfumato.storage.output_paths import require_writable
from sfumato.storage.run_directory import RunDirectory
from sfumato.training import Budget
from tests.helpers.cli import sfumato
from tests.helpers.runs import images, tiny_run

OURS = "run again with --debug and report it"


@pytest.mark.parametrize("number", sorted(REASONS))
def test_every_refusal_of_the_system_has_words(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "there"))

    monkeypatch.setattr("sfumato.recipes.resolver.resolve", refuse)
    result = sfumato("config", "validate", "digits")
    assert result.code == 2
    assert (
        result.err
        == f"error: {tmp_path / 'there'}: {REASONS[number][0]}\n  hint: {REASONS[number][1]}\n"
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("odd"), "operating system error: odd"),
        (MemoryError(), "not enough memory"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "not enough memory: CUDA out of memory",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "not enough memory: DefaultCPUAllocator",
        ),
        (
            UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"),
            "a name or text is not UTF-8",
        ),
    ],
)
def test_memory_and_names_have_words_too(error: Exception, said: str) -> None:
    found = in_words(error)
    assert found is not None
    assert str(found).startswith(said)
    assert found.hint


def test_a_fault_of_ours_is_still_reported() -> None:
    assert in_words(KeyError("x")) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = images(tmp_path_factory.mktemp("set") / "images", count=12)
    for image in found.rglob("*.png"):
        image.with_suffix(".txt").write_text("a grey square")
    return found


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    settings = tiny_run(folder, budget=Budget(steps=1), sampling=SamplingConfig(steps=2))
    return train(replace(settings, data=replace(settings.data, holdout=0.4)), run=path)


def verbs(folder: Path, run: Path, at: Path) -> dict[str, list[object]]:
    """Every verb that writes, told to write to `at`."""
    return {
        "train": ["train", folder, "budget.steps=1", "precision=float32", "--run", at],
        "sample": ["sample", run, "--num", 1, "--steps", 1, "--out", at],
        "export": ["export", run, "--format", "lora-kohya", "--out", at],
        "evaluate": ["evaluate", run, "--num", 2, "--out", at / "evaluation.json"],
        "report": ["report", run, "--out", at / "report.html"],
        "explain": ["explain", run, "--out", at],
        "data check": ["data", "check", folder, "--out", at],
        "data coverage": ["data", "coverage", folder, "--prompt", "a square", "--out", at],
        "data convert": ["data", "convert", folder, at / "set.tar"],
        "convert-checkpoint": [
            "convert-checkpoint",
            folder,
            "--i-trust-this-file",
            "--out",
            at / "x.safetensors",
        ],
    }


READING = {
    "resume",
    "ema",
    "sweep",
    "recipes",
    "slurm",
    "doctor",
    "compare",
    "config show",
    "config diff",
    "config validate",
    "config schema",
    "data cache",
}
WRITING = set(verbs(Path(), Path(), Path()))
THROUGH_TRAIN = {"finetune"}  # calls `runs.train` with a run of its own


def test_every_verb_is_known_to_write_or_to_read() -> None:
    """So that a new one is given a line here."""
    named = {command.name or command.callback.__name__ for command in app.registered_commands}
    for group in app.registered_groups:
        named |= {
            f"{group.name} {command.name or command.callback.__name__}"
            for command in group.typer_instance.registered_commands
        }
    assert named <= READING | WRITING | THROUGH_TRAIN
    assert named >= WRITING


@pytest.mark.parametrize("verb", sorted(WRITING))
def test_a_file_where_a_folder_is_needed_is_refused_by_every_verb(
    verb: str, folder: Path, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("mine")
    result = sfumato(*verbs(folder, run, tmp_path / "taken" / "below")[verb])
    assert result.code == 2, result.err
    assert OURS not in result.err
    assert "hint: " in result.err
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("verb", sorted(WRITING))
def test_a_place_that_cannot_be_written_to_is_refused_by_every_verb(
    verb: str, folder: Path, run: Path
) -> None:
    """In /proc nobody may make a folder, root included."""
    result = sfumato(*verbs(folder, run, Path("/proc/sfumato-was-here"))[verb])
    assert result.code == 2, result.err
    assert OURS not in result.err
    assert "hint: " in result.err


@pytest.mark.parametrize("verb", ["train", "evaluate", "explain", "data check", "data coverage"])
def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(
    verb: str, folder: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*arguments: object, **options: object) -> None:
        raise AssertionError("the work has begun")

    for name in (
        "sfumato.runs.preparation.open_data",
        "sfumato.data.check.inspect_data",
        "sfumato.data.check.captions.Vocabulary",
    ):
        monkeypatch.setattr(name, work)
    result = sfumato(*verbs(folder, run, Path("/proc/sfumato-was-here"))[verb])
    assert result.code == 2
    assert "choose another place with --" in result.err


def test_a_cache_that_cannot_be_written_to_is_refused_by_the_command_that_fills_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SFUMATO_CACHE", "/proc/sfumato-was-here")
    result = sfumato("data", "cache", "digits")
    assert result.code == 2
    assert "choose another place with SFUMATO_CACHE" in result.err


@pytest.mark.parametrize("said", ["many", "inf", "nan"])
def test_a_limit_in_the_environment_that_is_not_a_number_is_refused(
    said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFUMATO_REMOTE_GIB", said)
    with pytest.raises(DataError, match=r"^SFUMATO_REMOTE_GIB: "):
        limit_bytes()


def test_a_taken_run_is_refused_before_the_data_are_read(
    folder: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*arguments: object, **options: object) -> None:
        raise AssertionError("the data were read")

    monkeypatch.setattr("sfumato.runs.preparation.open_data", work)
    monkeypatch.setattr("sfumato.runs.training.resolve_config", work)
    result = sfumato("train", folder, "--run", run)
    assert result.code == 2
    assert f"{run}: there is already a run here" in result.err


def test_with_one_image_held_out_copies_are_still_judged(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_data

    def few(settings: Run, **options: object) -> Dataset:
        dataset = opened(settings)
        return replace(dataset, config=replace(dataset.config, holdout=1e-9))

    monkeypatch.setattr("sfumato.data.holdout.MIN_HOLDOUT_IMAGES", 1)
    monkeypatch.setattr("sfumato.runs.preparation.open_data", few)
    quick = functools.partial(train_classifier, steps=2)
    monkeypatch.setattr("sfumato.evaluation.report.train_classifier", quick)
    out = tmp_path / "figures.json"
    result = sfumato("evaluate", run, "--num", 4, "--guidance", 1, "--out", out)
    assert result.code == 0
    assert "note: 1 image is held out: " in result.out
    samples = json.loads(out.read_text())["rows"][-1]
    assert samples["copies"]["n"] == 4
    assert samples["kid_held_out"] is None
    assert "of 4 samples [" in result.out


def test_a_place_is_tried_without_a_trace(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    assert require_writable(place) == place
    assert list(tmp_path.iterdir()) == []
    (place / "x.json").mkdir(parents=True)
    with pytest.raises(RunError, match="a folder of that name exists"):
        require_writable(place, place / "x.json")


def test_a_system_without_file_locks_says_that_it_cannot_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows; tests/test_platform.py has the whole package there."""
    monkeypatch.setattr(run_directory, "HAS_FILE_LOCKS", False)
    with (
        pytest.raises(RunError, match=r"lacks the file locks .*(\n.*)*on Windows inside WSL"),
        RunDirectory(tmp_path).locked(),
    ):
        pass


def test_a_run_that_cannot_be_written_to_is_not_resumed_and_says_so(
    run: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    (tmp_path / ".lock").mkdir()  # so that the lock cannot be opened
    result = sfumato("resume", tmp_path)
    assert result.code == 2
    assert "cannot be written to" in result.err
    assert OURS not in result.err


@pytest.mark.parametrize(
    "verb", ["sample", "evaluate", "explain", "data check", "data coverage", "data convert"]
)
def test_a_disk_that_fills_up_is_named_by_every_verb(
    verb: str, folder: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file that is written to below the target fails after it was opened."""
    from PIL import Image

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    monkeypatch.setattr("sfumato.storage.atomic.os.replace", full)
    quick = functools.partial(train_classifier, steps=2)
    monkeypatch.setattr("sfumato.evaluation.report.train_classifier", quick)
    result = sfumato(*verbs(folder, run, tmp_path / "out")[verb])
    assert result.code == 2, result.err
    assert OURS not in result.err
