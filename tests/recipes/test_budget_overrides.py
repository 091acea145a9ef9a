"""A limit that is set on a recipe, a file, a folder or a run replaces the limits that were
there.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from sfumato import config
from sfumato.errors import ConfigError
from sfumato.recipes import RECIPES, Run, budget_overrides, recipe, resolve
from sfumato.runs import train
from sfumato.training import Budget
from tests.helpers.runs import images, tiny_run


@pytest.mark.parametrize("name", list(RECIPES))
def test_steps_replace_the_minutes_of_every_recipe(name: str) -> None:
    assert resolve(name, ["budget.steps=1200"]).budget == Budget(steps=1200)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["budget.steps=9"], Budget(steps=9)),
        (["budget.epochs=2.5"], Budget(epochs=2.5)),
        (["budget.minutes=3"], Budget(minutes=3)),
        (["budget.steps=9", "budget.minutes=3"], Budget(steps=9, minutes=3)),
        ({"budget": {"samples": 64}}, Budget(samples=64)),
        (["budget.steps=9", "budget.minutes=null"], Budget(steps=9)),
        (["batch_size=3"], Budget(minutes=1)),
    ],
)
def test_limits_that_are_set_together_all_hold(given: object, expected: Budget) -> None:
    assert resolve("digits", given).budget == expected


def test_the_limit_of_an_autoencoder_is_replaced_too() -> None:
    run = resolve("emoji-latent", ["autoencoder.budget.steps=7"])
    assert run.autoencoder.budget == Budget(steps=7)
    assert run.budget == recipe("emoji-latent").budget


def test_files_folders_runs_and_configurations_are_no_different(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("recipe: digits\nbudget: {steps: 5}\n")
    assert resolve(tmp_path / "mine.yaml").budget == Budget(steps=5)
    assert resolve(tmp_path / "mine.yaml", ["budget.minutes=2"]).budget == Budget(minutes=2)
    assert resolve(images(tmp_path / "images"), ["budget.epochs=3"]).budget == Budget(epochs=3)
    assert resolve(tiny_run(tmp_path), ["budget.minutes=2"]).budget == Budget(minutes=2)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(config.dump_yaml(config.plain(recipe("digits"))))
    assert resolve(run, ["budget.steps=4"]).budget == Budget(steps=4)


def test_a_replaced_limit_is_said_and_nothing_else_is() -> None:
    base = config.plain(Run(name="x", budget=Budget(minutes=1)))
    changed, lines = budget_overrides.replace_limits(base, {"budget": {"steps": 1200}})
    assert lines == [
        "budget: steps=1200 replaces minutes=1; set both to stop at whichever comes first"
    ]
    assert changed["budget"]["minutes"] is None
    assert base["budget"]["minutes"] == 1  # what was given is left as it is
    for asked in (
        {},
        {"budget": 5},
        {"budget": {"minutes": 2}},
        {"budget": {"minutes": None}},
        {"autoencoder": "PixelsConfig"},
    ):
        assert budget_overrides.replace_limits(base, asked) == (base, [])


def test_training_says_which_limit_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny_run(images(tmp_path / "images"), budget=Budget(minutes=9))
    train(settings, overrides=["budget.steps=1"], run=tmp_path / "run")
    assert "budget: steps=1 replaces minutes=9" in capsys.readouterr().err


def test_a_budget_that_is_not_one_is_refused_as_before() -> None:
    with pytest.raises(ConfigError, match="budget"):
        resolve("digits", ["budget=5"])
