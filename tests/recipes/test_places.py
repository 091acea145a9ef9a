"""A run finds its data from any folder, also when both have moved; other data of the same name are
not taken for them.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfumato.config import load_yaml_file
from sfumato.errors import CheckpointError, DataError
from sfumato.generation.diffusion_model import SamplingConfig
from sfumato.recipes import resolve
from sfumato.recipes.paths import paths_relative_to_run, with_absolute_paths
from sfumato.runs import resume, train
from sfumato.runs.preparation import open_data
from sfumato.training import Budget
from tests.helpers.cli import sfumato
from tests.helpers.runs import images, tiny_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project: `pics` and a run `out/run` trained on them by a relative path."""
    project = tmp_path_factory.mktemp("places") / "project"
    images(project / "pics", count=20)
    with contextlib.chdir(project):
        train(
            tiny_run(Path("pics"), budget=Budget(steps=1), sampling=SamplingConfig(steps=2)),
            run="out/run",
        )
    return project


@pytest.fixture
def project(made: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of it, far from the original, which is hidden meanwhile."""
    hidden = made.with_name("hidden")
    made.rename(hidden)
    shutil.copytree(hidden, tmp_path / "copy")
    yield tmp_path / "copy"
    hidden.rename(made)


def path_of(run: Path) -> str:
    return resolve(run).data.source.path


def test_a_run_keeps_the_whole_path_of_its_data(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_yaml_file(made / "out" / "run" / "config.yaml")["data"]["source"]["path"] == str(
        made / "pics"
    )
    images(tmp_path / "pics", count=6)  # of the same name, elsewhere
    monkeypatch.chdir(tmp_path)
    assert path_of(made / "out" / "run") == str(made / "pics")
    assert len(open_data(resolve(made / "out" / "run")).entries) == 20


def test_a_run_that_moved_with_its_data_finds_them(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert path_of(project / "out" / "run") == str(project / "pics")
    resume(project / "out" / "run", overrides=["budget.steps=2"])
    assert load_yaml_file(project / "out" / "run" / "config.yaml")["data"]["source"]["path"] == str(
        project / "pics"
    )


def test_data_that_are_gone_are_asked_for_by_their_key(project: Path, tmp_path: Path) -> None:
    (project / "pics").rename(tmp_path / "elsewhere")
    result = sfumato("resume", project / "out" / "run")
    assert result.code == 2
    assert "no such file or folder" in result.err
    assert "data.source.path=NEW/PLACE" in result.err
    assert (
        sfumato(
            "resume",
            project / "out" / "run",
            f"data.source.path={tmp_path / 'elsewhere'}",
            "budget.steps=2",
        ).code
        == 0
    )


def test_a_relative_path_of_an_older_run_is_looked_for_around_it(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = project / "out" / "run"
    (run / "data.json").unlink()
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        "\n".join(
            "    path: pics" if line.startswith("    path:") else line for line in text.splitlines()
        )
    )
    monkeypatch.chdir(tmp_path)
    assert path_of(run) == str(project / "pics")
    monkeypatch.chdir(project)  # as it was always read
    assert path_of(run) == "pics"


def test_paths_of_encoders_are_kept_whole_too_and_names_stay_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("encoder", "auto"):
        Path(name).mkdir()
    settings = [
        "conditioner.text={kind: pretrained, encoder: encoder}",
        "autoencoder={kind: trained, features: auto}",
    ]
    run = with_absolute_paths(resolve("digits", settings))
    assert run.conditioner.text.encoder == str(tmp_path / "encoder")
    assert run.autoencoder.features == "auto"
    assert paths_relative_to_run(run, tmp_path / "runs" / "x") == {
        "conditioner.text.encoder": "../../encoder"
    }


def test_what_is_no_path_here_is_left_as_it_is() -> None:
    for path in ("hub:owner/name", "https://example.org/set.zip"):
        assert (
            resolve("digits", [f"data.source={{kind: zip, path: '{path}'}}"]).data.source.path
            == path
        )
    with pytest.raises(DataError, match=r"^data\.source\.path: nowhere: no such file or folder"):
        open_data(resolve("digits", {"data.source": {"kind": "Folder", "path": "nowhere"}}))


def test_changed_data_are_named_when_a_run_is_resumed(project: Path) -> None:
    gone = sorted((project / "pics").rglob("*.png"))[0]
    gone.unlink()
    with pytest.raises(
        CheckpointError,
        match=r"not what this run was trained on: 1 image\(s\) gone \(even/000\.png\)",
    ):
        resume(project / "out" / "run", overrides=["budget.steps=2"])


def test_a_damaged_newest_checkpoint_is_passed_over_by_sample(
    project: Path, tmp_path: Path
) -> None:
    run = project / "out" / "run"
    newest = max((run / "checkpoints").glob("step-*"))
    (newest / "ema.safetensors").write_bytes(b"")
    before = sorted(str(path) for path in run.rglob("*"))
    result = sfumato("sample", run, "--num", 1, "--steps", 1, "--out", tmp_path / "made")
    assert result.code == 0
    assert "skipped; step 0 is used" in result.err
    assert sorted(str(path) for path in run.rglob("*")) == before
