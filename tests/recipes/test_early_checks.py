"""What is known without torch is what is true with it, and what is certain to be refused is refused
at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from sfumato.data.sources.detect import BUILT_IN
from sfumato.errors import CheckpointError, ConfigError, RunError
from sfumato.recipes import RECIPES, Run, early_checks, recipe, resolve
from sfumato.runs import load
from sfumato.storage.run_directory import RunDirectory


def test_the_tables_are_those_of_the_recipes_sources_and_keys() -> None:
    assert {
        name: " ".join((function.__doc__ or "").split("\n\n")[0].split())
        for name, function in RECIPES.items()
    } == early_checks.SUMMARIES
    assert tuple(BUILT_IN) == early_checks.BUILT_IN
    assert set(early_checks.KEYS) == {field.name for field in fields(Run)}


@pytest.mark.parametrize(
    "source", [*RECIPES, *BUILT_IN, "mine.yaml", "hub:owner/name", "s3://bucket/set.tar", "."]
)
def test_what_may_stand_for_something_is_let_through(source: str) -> None:
    known = early_checks.require(source, ["budget.steps=3", "data.nonsense=1"])  # type: ignore[func-returns-value]
    assert known is None  # nothing was raised; what is inside a key is checked by the schema


def test_what_stands_for_nothing_is_refused_in_the_words_of_the_recipes() -> None:
    with pytest.raises(ConfigError) as early:
        early_checks.require("digit")
    with pytest.raises(ConfigError) as late:
        recipe("digit")
    assert str(early.value) == str(late.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("bugdet.steps=3", "unknown key `bugdet` (did you mean `budget`?)"),
        ("initial=3", "unknown key `initial`\n"),
        (
            "learning_rate=3",
            "unknown key `learning_rate` (did you mean `optimizer.learning_rate`?)",
        ),
        ("steps=3", "unknown key `steps` (did you mean `budget.steps`?)"),
        ("network.chanels=3", "unknown key `network.chanels` (did you mean `network.channels`?)"),
        ("xyzzy=3", "unknown key `xyzzy`\n"),
        ("steps", "sets nothing"),
        ("=3", "sets nothing"),
    ],
)
def test_a_wrong_key_names_another_only_if_it_is_near(override: str, said: str) -> None:
    def use() -> None:
        early_checks.require("digits", [override])
        resolve("digits", [override])

    with pytest.raises(ConfigError) as refused:
        use()
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["recipes"], 0),
        (["recipes", "--json"], 0),
        (["train", "digit"], 2),
        (["train", "digits", "bugdet.steps=3"], 2),
        (["train", "digits", "--stpes", "3"], 2),
        (["config", "show", "digit"], 2),
        (["config", "validate", "digits", "bugdet=1"], 2),
        (["config", "diff", "digits", "digit"], 2),
        (["trian"], 2),
    ],
)
def test_answers_that_need_no_model_load_no_torch(arguments: list[str], code: int) -> None:
    program = (
        f"import sys; from sfumato.cli.main import main; sys.argv[1:] = {arguments}\n"
        "try: main()\nexcept SystemExit as end: sys.exit(end.code)\n"
        "finally: print('loaded', sorted({'torch', 'numpy', 'scipy', 'sklearn'} & "
        "set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.endswith("loaded []\n")


def test_recipes_are_listed_for_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sfumato", "recipes", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == early_checks.SUMMARIES


@pytest.mark.parametrize("file", ["model_index.json", "config.json"])
def test_a_diffusers_folder_is_called_by_its_name(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text(
        json.dumps({"_class_name": "DDPMPipeline", "_diffusers_version": "0.38.0"})
    )
    for use in (early_checks.require, resolve):
        with pytest.raises(RunError, match=r"diffusers model \(DDPMPipeline\)"):
            use(str(tmp_path))
    with pytest.raises((CheckpointError, RunError), match=r"names neither unet|DDPMPipeline"):
        load(str(tmp_path))


@pytest.mark.parametrize("text", ["{}", "[1]", "not json", '{"_class_name": 5}'])
def test_any_other_folder_with_such_a_file_is_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    early_checks.require(str(tmp_path))
    with pytest.raises(RunError, match=r"has no config\.yaml"):
        RunDirectory.existing(tmp_path)
