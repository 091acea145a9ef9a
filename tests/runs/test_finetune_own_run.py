"""A run of ours, fine-tuned on images of a category that it has never seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import sfumato
from sfumato.adapters import without_adapters
from sfumato.errors import CheckpointError
from sfumato.runs.finetuning import choose_finetuning
from sfumato.storage import checkpoint
from sfumato.training import Budget, PreservationConfig
from tests.helpers import cli
from tests.helpers.runs import fingerprint, images, tiny_run
from tests.training.test_resume import interrupted

QUICK = [
    "budget.steps=8",
    "validation.every_steps=4",
    "validation.bins=2",
    "optimizer.learning_rate=0.01",
    "adapter.rank=2",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the categories even and odd."""
    folder = tmp_path_factory.mktemp("base")
    return sfumato.train(tiny_run(images(folder / "set")), run=folder / "run")


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images in one flat folder."""
    folder = tmp_path_factory.mktemp("new")
    source = images(folder / "all", count=20) / "even"
    return source.rename(folder / "prime")


@pytest.fixture(scope="module")
def tuned(base: Path, new: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tuned") / "run"
    return sfumato.finetune(base, str(new), overrides=[*QUICK, "data.category=prime"], run=place)


def settings(base: Path, new: Path, *overrides: str):
    from sfumato.recipes.resolver import resolve

    run = choose_finetuning(base, str(new), ["data.category=prime"]).run
    kept = [one for one in QUICK if "adapter" not in "".join(overrides) or "adapter" not in one]
    return resolve(run, [*kept, "data.category=prime", *overrides])


def tensors(run: Path, name: str = "ema") -> dict[str, torch.Tensor]:
    return checkpoint.read_newest(run / "checkpoints")[0].tensors[name]


def test_a_new_category_is_added_and_the_base_stays_as_it_was(base: Path, tuned: Path) -> None:
    learned, before = sfumato.load(tuned, weights="raw"), sfumato.load(base)
    assert learned.info.categories == ("even", "odd", "prime")
    assert learned.info.added_categories == 1
    after = learned.model.state_dict()
    for name, tensor in before.model.state_dict().items():
        assert torch.equal(after[name], tensor), name
    # a checkpoint holds what was added, and no tensor of the base
    assert not tensors(tuned).keys() & before.model.state_dict().keys()
    assert not list((tuned / "checkpoints").glob("frozen-*"))
    assert learned.sample(2, category="prime", steps=2).shape == (2, 1, 8, 8)


def test_without_what_was_added_it_is_the_base(base: Path, tuned: Path) -> None:
    learned, before = sfumato.load(tuned, weights="raw"), sfumato.load(base)
    for category in ("even", "odd"):
        expected = before.sample(3, category=category, steps=3, seed=1)
        assert not torch.equal(learned.sample(3, category=category, steps=3, seed=1), expected)
        with without_adapters(learned.model):
            assert torch.equal(learned.sample(3, category=category, steps=3, seed=1), expected)
    with without_adapters(learned.model):  # a new category begins as none at all
        new = learned.sample(3, category="prime", steps=3, seed=1)
    assert torch.equal(new, before.sample(3, steps=3, seed=1))


def test_before_the_first_step_it_is_the_base(base: Path, new: Path) -> None:
    from sfumato.runs.preparation import prepare

    prepared = prepare(settings(base, new))
    level, x = torch.full((2,), 0.3), torch.randn(2, 1, 8, 8)
    before = sfumato.load(base).model
    context = {"category": torch.tensor([0, 1])}
    with torch.no_grad():
        untrained = prepared.model.eval()
        ours = untrained.network(x, level, untrained.conditioner(context, 2))
        assert torch.equal(ours, before.network(x, level, before.conditioner(context, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "none"])
def test_resumed_it_equals_the_uninterrupted_run(
    base: Path, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("sfumato.training.looks.FREE_S", 1e9)  # looks do not depend on the time
    changes = ["checkpoint.every_steps=3"]
    if kind == "none":
        changes.append("adapter={kind: none}")
    config = settings(base, new, *changes)
    assert isinstance(config.preservation, PreservationConfig)
    whole = sfumato.train(config, run=tmp_path / "whole")
    broken = interrupted(config, tmp_path / "broken", monkeypatch, after=5)
    assert fingerprint(sfumato.resume(broken)) == fingerprint(whole)
    verdicts = [(run / "best" / "verdict.json").read_text() for run in (whole, broken)]
    assert verdicts[0] == verdicts[1]
    assert json.loads(verdicts[0])["base"] is not None


def test_all_weights_are_loaded_without_the_base(base: Path, new: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    config = settings(copy, new, "adapter={kind: none}", "budget.steps=2")
    run = sfumato.train(config, run=tmp_path / "run")
    shutil.rmtree(copy)
    pipeline = sfumato.load(run)
    assert pipeline.sample(1, category="prime", steps=1).isfinite().all()


def test_another_base_or_none_is_refused(base: Path, new: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    run = sfumato.train(settings(copy, new, "budget.steps=1"), run=tmp_path / "run")
    other = tmp_path / "other"
    another = tiny_run(images(tmp_path / "set"), seed=1, budget=Budget(steps=1))
    sfumato.train(another, run=other)
    moved = copy.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="is not there any more"):
        sfumato.load(run)
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace(str(copy), str(moved))
    )
    sfumato.load(run)
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace(str(moved), str(other))
    )
    with pytest.raises(CheckpointError, match=r"their hash is \w{12}, and was \w{12}"):
        sfumato.load(run)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["preservation=null", "data.category="], "none of 10 images has one"),
        (["data.category=prime", "data.categories=[odd, even]"], "are not those of the base"),
        (["data.category=prime", "network.channels=64"], "does not fit"),
    ],
)
def test_what_does_not_fit_the_base_is_refused_before_work(
    base: Path, new: Path, tmp_path: Path, overrides: list[str], sentence: str
) -> None:
    result = cli.sfumato("finetune", base, new, *overrides, "--run", tmp_path / "run")
    assert result.code == 2
    assert sentence in result.err
    assert not (tmp_path / "run").exists()


def test_the_report_names_a_step_and_shows_images(tuned: Path) -> None:
    report = json.loads((tuned / "finetuning" / "report.json").read_text())
    named = report["verdict"]["best_step"]
    assert (tuned / "best" / f"step-{named:09d}.safetensors").is_file()
    assert len(report["levels"]) == 2
    for name in ("known.png", "new.png"):
        assert (tuned / "finetuning" / name).is_file()
    # the weights of the verdict are those that are sampled by default
    chosen = checkpoint.load_snapshot(tuned / "best", step=named)
    loaded = sfumato.load(tuned).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in chosen.items())
