"""Runs and configurations that were saved in former words load, mean what they meant, and go on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sfumato
from sfumato import config, runs
from sfumato.errors import ConfigError
from sfumato.recipes import Run, builtin

OLD = Path(__file__).parents[1] / "fixtures" / "old_run"
KINDS = json.loads((OLD / "kinds.json").read_text())


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    shutil.copytree(OLD, tmp_path / "old")
    return tmp_path / "old" / "run"


def test_a_run_that_was_begun_before_goes_on_to_the_same_weights(old_run: Path) -> None:
    runs.resume(old_run)
    resumed = load_file(old_run / "checkpoints" / "step-000000006" / "model.safetensors")
    expected = load_file(OLD / "expected.safetensors")
    assert resumed.keys() == expected.keys()
    for name, value in resumed.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_run_that_was_begun_before_is_sampled(old_run: Path) -> None:
    pipeline = sfumato.load(old_run)
    assert pipeline.categories == ("bright", "dark")
    assert pipeline.sample(2, category="dark", steps=2).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("name", sorted(path.stem for path in (OLD / "recipes").iterdir()))
def test_recipes_in_former_words_are_the_recipes(name: str) -> None:
    written = config.load_yaml_file(OLD / "recipes" / f"{name}.yaml")
    assert config.parse(Run, written, where=name) == builtin.recipe(name)


@pytest.mark.parametrize("overrides", KINDS, ids=lambda overrides: overrides[-1])
def test_former_kinds_are_read(overrides: list[str]) -> None:
    base = config.load_yaml_file(OLD / "recipes" / "digits.yaml")
    kind = overrides[-1].rpartition("=")[2]
    try:
        config.parse(Run, config.with_overrides(base, overrides), where="old")
        message = ""
    except ConfigError as error:  # some kinds have keys without a default
        message = str(error)
    assert repr(kind) not in message
