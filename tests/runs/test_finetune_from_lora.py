"""A fine-tuning that goes on from the LoRA of a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfumato
from sfumato import config
from sfumato.adapters import LoRA, adapted_layers, without_adapters
from sfumato.errors import CheckpointError, ConfigError
from sfumato.recipes.resolver import resolve
from sfumato.recipes.run import Run
from sfumato.recipes.run_config import write_run_config
from sfumato.runs.finetuning import choose_finetuning
from sfumato.runs.initial_adapter import initial_of_run
from sfumato.runs.preparation import prepare
from sfumato.storage.run_directory import RunDirectory
from tests.helpers import cli
from tests.helpers.runs import images, tiny_run

QUICK = [
    "budget.steps=2",
    "validation.every_steps=2",
    "validation.samples=4",
    "validation.bins=2",
    "preview.num=2",
    "optimizer.learning_rate=0.01",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the categories even and odd."""
    folder = tmp_path_factory.mktemp("base")
    settings = resolve(tiny_run(images(folder / "set", count=20)), ["budget.steps=1"])
    return sfumato.train(settings, run=folder / "run")


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images in one flat folder."""
    folder = tmp_path_factory.mktemp("new")
    return (images(folder / "all", count=20) / "even").rename(folder / "prime")


@pytest.fixture(scope="module")
def tuned(base: Path, new: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with a LoRA and a new category."""
    settings, _ = going_on(base, new, "adapter.rank=2", "adapter.alpha=3")
    return sfumato.train(settings, run=tmp_path_factory.mktemp("tuned") / "run")


def going_on(
    model: Path, new: Path, *overrides: str, category: str = "prime"
) -> tuple[Run, list[str]]:
    changes = [*QUICK, f"data.category={category}", *overrides]
    chosen = choose_finetuning(model, str(new), changes)
    return resolve(chosen.run, changes), chosen.lines


def test_step_0_is_the_run_that_is_continued_and_its_base_stays(
    base: Path, new: Path, tuned: Path
) -> None:
    settings, lines = going_on(tuned, new)
    assert f"goes on from the LoRA of {tuned}" in lines[0]
    assert "there is one LoRA, not two" in lines[0]
    assert f"the base stays {base}" in lines[1]
    assert isinstance(settings.adapter, LoRA)
    assert (settings.adapter.rank, settings.adapter.alpha) == (2, 3.0)
    assert settings.base == str(base)
    untrained = prepare(settings).model.eval()
    before, plain = sfumato.load(tuned).model, sfumato.load(base).model
    context = {"category": torch.tensor([0, 1, 2])}
    level, x = torch.full((3,), 0.3), torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        ours = untrained.network(x, level, untrained.conditioner(context, 3))
        assert torch.equal(ours, before.network(x, level, before.conditioner(context, 3)))
        with without_adapters(untrained):
            ours = untrained.network(x, level, untrained.conditioner(context, 3))
        known = {"category": torch.tensor([0, 1, -1])}  # a new category begins as none at all
        theirs = plain.network(x, level, plain.conditioner(known, 3))
        assert torch.equal(ours, theirs)
        changed = before.network(x, level, before.conditioner(context, 3))
        assert not torch.equal(ours, changed)


def test_a_further_category_comes_after_those_that_were_learned(new: Path, tuned: Path) -> None:
    settings, _ = going_on(tuned, new, category="square")
    prepared = prepare(settings)
    assert prepared.info.categories == ("even", "odd", "prime", "square")
    rows = prepared.model.conditioner.parts["category"].added.rows  # type: ignore[union-attr]
    learned = sfumato.load(tuned).model.conditioner.parts["category"].added.rows  # type: ignore[union-attr]
    assert torch.equal(rows[:1], learned)
    assert torch.equal(rows[1:], torch.zeros_like(rows[1:]))


def test_it_trains_and_is_loaded_and_resumed_without_the_run_that_it_began_with(
    base: Path, new: Path, tuned: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tuned, tmp_path / "copy"))
    settings, _ = going_on(copy, new)
    run = sfumato.train(settings, run=tmp_path / "run")
    shutil.rmtree(copy)
    learned = sfumato.load(run, weights="raw").model
    layers, before = adapted_layers(learned), adapted_layers(sfumato.load(tuned).model)
    assert layers.keys() == before.keys()
    assert all(layers[name].scale == before[name].scale == 1.5 for name in layers)
    assert any(not torch.equal(layers[n].lora_B, before[n].lora_B) for n in layers)
    sfumato.resume(run, overrides=["budget.steps=3"])
    assert resolve(run).base == str(base)


def test_a_change_of_the_first_values_is_refused_before_the_first_step(
    new: Path, tuned: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tuned, tmp_path / "copy"))
    settings, _ = going_on(copy, new)
    (weights,) = (copy / "best").glob("*.safetensors")
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(
        CheckpointError, match=r"has changed: the hash of its LoRA is \w{12}, and was"
    ):
        prepare(settings)
    shutil.rmtree(copy)
    with pytest.raises(CheckpointError, match="is not there, and the first values"):
        prepare(settings)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["adapter.rank=4"], r"adapter\.rank: 4 contradicts run, which has 2"),
        (["adapter.alpha=1"], r"adapter\.alpha: 1\.0 contradicts run, which has 3\.0"),
        (["adapter.convolutions=false"], r"adapter\.convolutions: False contradicts run"),
        (["adapter.kind=none"], r"adapter\.kind=none cannot begin with a LoRA"),
    ],
)
def test_what_contradicts_the_lora_is_refused_by_name(
    new: Path, tuned: Path, overrides: list[str], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        choose_finetuning(tuned, str(new), ["data.category=prime", *overrides])


def test_two_loras_in_one_run_are_refused(new: Path, tuned: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"")
    result = cli.sfumato("finetune", tuned, new, "data.category=prime", "--lora", file)
    assert result.code == 2
    assert "has a LoRA of its own, and a run has one" in result.err


def test_runs_of_other_adapters_are_refused(new: Path, tuned: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tuned, tmp_path / "copy"))
    plain = config.plain(resolve(copy))
    write_run_config(RunDirectory(copy), {**plain, "adapter": {"kind": "textual-inversion"}})
    with pytest.raises(ConfigError, match=r"by adapter\.kind=textual-inversion, whose changes"):
        initial_of_run(copy)
