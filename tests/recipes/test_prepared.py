"""A source of images is listed once and a model built once, however many parts of a run need
them.
"""

from pathlib import Path

import pytest

from sfumato import config, recipes
from sfumato.data import Folder
from sfumato.networks import UNetConfig
from sfumato.runs import prepare, train
from tests.helpers.runs import images, tiny_run


def test_train_folder_lists_once_and_builds_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, listed, built = images(tmp_path / "set", count=12), [], []
    listing, build = Folder.listing, UNetConfig.build
    monkeypatch.setattr(Folder, "listing", lambda self: listed.append(1) or listing(self))
    monkeypatch.setattr(UNetConfig, "build", lambda self, **k: built.append(1) or build(self, **k))
    monkeypatch.setattr("sfumato.training.Trainer.run", lambda self, **_: True)
    train(str(place), overrides=["budget.steps=1", "data.cache=off"], run=tmp_path / "run")
    assert (len(listed), len(built)) == (1, 1)


def test_another_source_in_the_settings_is_listed_again(tmp_path: Path) -> None:
    first, other = images(tmp_path / "first", count=12), images(tmp_path / "other", count=16)
    chosen = recipes.resolver.resolve_config(str(first), [f"data.source.path={other}"])
    assert chosen.listing_of(chosen.run) is None
    assert len(prepare(chosen.run, listing=chosen.listing_of(chosen.run)).dataset.entries) == 16


def test_predicting_leaves_the_model_as_it_was_built(tmp_path: Path) -> None:
    from sfumato.runs.cost import estimate_cost

    prepared = prepare(tiny_run(images(tmp_path / "set")))
    before = {name: value.clone() for name, value in prepared.model.state_dict().items()}
    estimate_cost(prepared)
    after = prepared.model.state_dict()
    assert all(bool((after[name] == value).all()) for name, value in before.items())


def test_a_commented_configuration_is_the_configuration() -> None:
    for name in recipes.RECIPES:
        run = recipes.recipe(name)
        text = config.dump_commented(run)
        assert config.parse(recipes.Run, config.load_yaml(text, where=name)) == run
        assert "# batch_size: images for each optimizer step" in text


def test_the_schema_explains_keys() -> None:
    schema = config.json_schema(recipes.Run)
    assert schema["properties"]["batch_size"]["description"].startswith("images for each optimizer")
    dit = next(part for name, part in schema["$defs"].items() if name.endswith("DiTConfig_tagged"))
    assert dit["properties"]["patch_size"]["description"]
