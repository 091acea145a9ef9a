"""What the program says, where it says it, and how it exits, before any model is trained."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal
from unittest import mock

import pytest

import sfumato as package
from sfumato import config
from sfumato.cli import doctor as doctor_module
from sfumato.cli.metavars import in_words
from sfumato.config import load_yaml
from sfumato.data import Digits, Folder
from sfumato.errors import ConfigError, DivergedError
from sfumato.recipes import Run, recipe, resolve
from tests.helpers.cli import sfumato

VERBS = [
    "train",
    "resume",
    "sample",
    "compare",
    "evaluate",
    "sweep",
    "explain",
    "recipes",
    "doctor",
    "config",
    "data",
]


def in_new_python(code: str) -> str:
    """Standard output of a program run in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def digit_folder(root: Path, *, per_category: int = 12, categories: str = "01") -> Path:
    """Digits as PNG files in one folder a category."""
    count = dict.fromkeys(categories, 0)
    for entry in Digits().listing().entries:
        if count.get(entry.category, per_category) < per_category:
            count[entry.category] += 1
            path = root / entry.category / f"{entry.name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(entry.image.read())
    return root


def test_help_lists_the_verbs() -> None:
    result = sfumato("--help")
    assert result.code == 0
    assert all(f" {verb} " in result.out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    result = sfumato(verb, "--help")
    assert result.code == 0
    assert f"sfumato {verb}" in result.out


def test_without_a_verb_the_help_is_shown() -> None:
    assert "train" in sfumato().out + sfumato().err


def test_the_version() -> None:
    assert sfumato("--version") == (0, f"{package.__version__}\n", "")


def test_neither_import_nor_help_loads_torch() -> None:
    heavy = "sorted({'torch', 'sklearn', 'scipy', 'yaml'} & set(sys.modules))"
    assert in_new_python(f"import sys, sfumato; print({heavy})") == "[]\n"
    for arguments in (
        ["--help"],
        ["train", "--help"],
        ["config", "show", "--help"],
        ["data", "--help"],
        ["--version"],
    ):
        code = f"import sys; from sfumato.cli.main import main; sys.argv[1:] = {arguments}\ntry: main()\nexcept SystemExit: print({heavy})"
        assert in_new_python(code).endswith("[]\n")
    assert "torch" in in_new_python(f"import sys, sfumato; sfumato.load; print({heavy})")


@pytest.mark.parametrize(
    "program",
    [(str(Path(sys.executable).with_name("sfumato")),), (sys.executable, "-m", "sfumato")],
)
def test_the_installed_program_is_this_one(program: tuple[str, ...]) -> None:
    done = subprocess.run(
        [*program, "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == f"{package.__version__}\n"


def test_the_package_has_what_it_lists_and_nothing_else() -> None:
    assert all(getattr(package, name) for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = package.trian


def test_an_unknown_recipe_names_the_nearest() -> None:
    result = sfumato("train", "digit")
    assert result.code == 2
    assert result.out == ""
    assert result.err == (
        "error: train: 'digit' is not a recipe, YAML file or folder\n"
        "  hint: did you mean 'digits'? `sfumato recipes` lists the built-in ones; a folder or "
        "file must exist\n"
    )


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    result = sfumato("train", "digits", "bugdet.steps=3", "--run", tmp_path / "run")
    assert result.code == 2
    assert "digits: unknown key `bugdet` (did you mean `budget`?)" in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [["trian"], ["train"], ["train", "digits", "--stpes", "3"], ["sample", "x", "--num", "0"]],
)
def test_a_wrong_command_line_exits_2(arguments: list[str]) -> None:
    result = sfumato(*arguments)
    assert result.code == 2
    assert "Usage" in result.err


def test_a_traceback_is_for_debug_only_and_debug_may_stand_anywhere() -> None:
    result = sfumato("config", "show", "digit")
    assert result.code == 2
    assert "Traceback" not in result.err
    for arguments in (
        ["--debug", "config", "show", "digit"],
        ["config", "show", "digit", "--debug"],
    ):
        with pytest.raises(ConfigError):
            sfumato(*arguments)
    done = subprocess.run(
        [sys.executable, "-m", "sfumato.cli.main", "config", "show", "digit", "--debug"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            DivergedError("it diverged", hint="lower the rate"),
            3,
            "error: it diverged\n  hint: lower the rate\n",
        ),
        (
            RuntimeError("odd"),
            1,
            "error: RuntimeError: odd\n  hint: run again with --debug and report it\n",
        ),
        (
            ConfigError("bad \x1b]0;owned\x07 name"),
            2,
            "error: bad \N{REPLACEMENT CHARACTER}]0;owned\N{REPLACEMENT CHARACTER} name\n",
        ),
    ],
)
def test_errors_have_their_exit_codes_and_no_control_characters(
    error: Exception, code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("sfumato.runs.training.resolve_config", fail)
    assert sfumato("train", "digits") == (code, "", said)


def test_recipes_are_listed_with_what_they_are() -> None:
    result = sfumato("recipes")
    assert result.code == 0
    lines = result.out.splitlines()
    assert (
        next(line for line in lines if line.startswith("digits"))
        .split(maxsplit=1)[1]
        .startswith("Handwritten digits, 8 x 8")
    )
    assert len({len(line) - len(line.split(maxsplit=1)[1]) for line in lines}) == 1  # one column


def test_show_prints_a_configuration_that_reads_back(tmp_path: Path) -> None:
    result = sfumato("config", "show", "digits", "budget.steps=6", "objective.schedule=Cosine")
    expected = resolve("digits", ["budget.steps=6", "objective.schedule=Cosine"])
    assert config.parse(Run, load_yaml(result.out, where="shown")) == expected
    (tmp_path / "shown.yaml").write_text(result.out)
    assert sfumato("config", "show", tmp_path / "shown.yaml").out == result.out


def test_a_yaml_file_builds_on_its_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "recipe: digits\nname: mine\nbudget: {steps: 7}\nobjective: {schedule: {kind: karras, "
        "rho: 5}}\n"
    )
    assert sfumato("config", "diff", "digits", path).out.splitlines() == [
        "budget.steps: None -> 7",
        "budget.minutes: 1.0 -> None",
        "name: digits -> mine",
        "objective.schedule.kind: warped -> karras",
        "objective.schedule.schedule.kind: linear -> (absent)",
        "objective.schedule.warp.kind: logit-normal -> (absent)",
        "objective.schedule.warp.mean: 0.0 -> (absent)",
        "objective.schedule.warp.std: 1.0 -> (absent)",
        "objective.schedule.sigma_min: (absent) -> 0.002",
        "objective.schedule.sigma_max: (absent) -> 80.0",
        "objective.schedule.rho: (absent) -> 5.0",
    ]
    assert sfumato("config", "diff", path, path).out == ""


def test_validate_says_valid_or_names_the_file_and_the_key(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: digits\nname: mine\n")
    assert sfumato("config", "validate", path) == (0, f"{path}: valid (mine)\n", "")
    path.write_text("recipe: digits\noptimzer: {learning_rate: 1}\n")
    result = sfumato("config", "validate", path)
    assert result.code == 2
    assert f"{path}: unknown key `optimzer` (did you mean `optimizer`?)" in result.err
    path.write_text("recipe: [1]\n")
    assert sfumato("config", "validate", path).code == 2


@pytest.mark.parametrize(
    "payload",
    ["!!python/object/apply:os.mkdir [owned]", "a: &x 1\nb: *x", "sampling: {_target_: os.mkdir}"],
)
def test_a_yaml_file_cannot_build_objects(
    tmp_path: Path, payload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(f"recipe: digits\n{payload}\n" if ":" in payload[:10] else payload)
    assert sfumato("train", "bad.yaml", "--run", "run").code == 2
    assert os.listdir() == ["bad.yaml"]


def test_the_schema_is_json_with_every_key() -> None:
    schema = json.loads(sfumato("config", "schema").out)
    assert {"seed", "batch_size", "data", "budget", "optimizer", "precision", "compile"} <= set(
        schema["properties"]
    )


@pytest.fixture
def slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured, and everything is slow."""
    monkeypatch.setattr(doctor_module, "_seconds", lambda work, device: 60.0)


def test_doctor_says_what_it_knows_before_it_measures(slow_machine: None) -> None:
    result = sfumato("doctor")
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].startswith(
        f"sfumato {package.__version__}, Python {sys.version.split()[0]}, torch "
    )
    assert [line.split(":")[0] for line in lines[-4:]] == [
        "float32",
        "float32",
        "bfloat16",
        "bfloat16",
    ]
    for said in ("GPUs: ", "compiling: ", "extra diffusers: ", "bfloat16 instructions: "):
        assert any(line.startswith(said) for line in lines[:-4])


def test_a_slow_product_is_not_rounded_to_nothing(slow_machine: None) -> None:
    """A machine that emulates bfloat16 was said to reach 0 GFLOP/s."""
    measured = sfumato("doctor").out.splitlines()[-4:]
    assert "bfloat16: matrix product 0.0358 GFLOP/s" in measured
    assert " 0 GFLOP/s" not in "".join(measured)


def test_doctor_answers_a_program(slow_machine: None) -> None:
    found = json.loads(sfumato("doctor", "--json").out)
    assert found["gflops"]["bfloat16"]["matrix product"] == 2 * 1024**3 / 60 / 1e9
    assert found["bfloat16_instructions"] in (True, False, None)
    assert set(found["extras"]) == set(doctor_module.EXTRAS)


def test_what_takes_long_is_measured_once() -> None:
    calls: list[None] = []
    with mock.patch("time.perf_counter", itertools.count(0.0, 5.0).__next__):
        assert doctor_module._seconds(lambda: calls.append(None), "cpu") == 5.0
    assert len(calls) == 1


@pytest.mark.parametrize("verb", [*VERBS, "ema", "data check", "data convert", "config show"])
def test_help_names_values_as_a_person_reads_them(verb: str) -> None:
    options = [
        line
        for line in sfumato(*verb.split(), "--help").out.splitlines()
        if "--" in line and "--help" not in line
    ]
    for python in (
        "<int>",
        "<int range",
        "<float>",
        "<float range",
        "<float,",
        "<str>",
        "list[",
        "<bool>",
        "float,float",
    ):
        assert not [line for line in options if python in line]


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (int, "<integer>"),
        (bool, ""),
        (Path | None, "<path>"),
        (Annotated[list[str] | None, "help"], "<text> ..."),
        (tuple[float, float] | None, "<number> <number>"),
        (Literal["a", "b"], None),
        (list[bytes], None),
        (int | str, None),
    ],
)
def test_values_in_words(annotation: object, expected: str | None) -> None:
    assert in_words(annotation) == expected


def test_a_dry_run_prints_what_it_would_do_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = sfumato("train", "digits", "budget.steps=6", "--dry-run")
    assert result.code == 0
    lines = result.out.splitlines()
    assert (
        lines[0] == "budget: steps=6 replaces minutes=1; set both to stop at whichever comes first"
    )
    assert lines[1:3] == [
        "1506 training images, 291 held out, 0 left out",
        "10 categories; 0.73M parameters",
    ]
    assert lines[-2].startswith("summary: 1506 images at 8 px, ")
    assert lines[-1].startswith("verdict: too short")
    assert "kind:" not in result.out
    assert os.listdir() == []


def test_a_folder_gets_a_recipe_of_its_own(tmp_path: Path) -> None:
    root = digit_folder(tmp_path / "my digits")
    run = resolve(root)
    assert run.name == "my digits"
    assert run.data.source == Folder(str(root))
    assert (run.data.resolution, run.data.channels) == (8, 1)
    assert run.conditioner.names == ("category",)
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (root / "0").iterdir():
        path.rename(flat / path.name)
    assert resolve(flat).conditioner.names == ()
    assert "\n2 categories" not in sfumato("train", flat, "--dry-run").out


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("empty", "empty: holds no images"),
        ("note.txt", "note.txt: is not a file type that holds images"),
        ("no.yaml", "no.yaml: cannot be read"),
    ],
)
def test_sources_that_are_none(tmp_path: Path, source: str, said: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("hello")
    result = sfumato("train", tmp_path / source)
    assert result.code == 2
    assert said in result.err


@pytest.mark.parametrize("verb", ["sample", "evaluate", "resume"])
def test_a_folder_that_is_no_run_says_so(tmp_path: Path, verb: str) -> None:
    result = sfumato(verb, tmp_path)
    assert result.code == 2
    assert (
        "is not a run: it has no config.yaml\n  hint: name a folder that `sfumato train` made\n"
        in result.err
    )


def test_explaining_a_recipe_draws_the_ideal_denoiser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = sfumato("explain", "digits")
    assert result.code == 0
    names = [
        "schedule.png",
        "logsnr.png",
        "density.png",
        "noising.png",
        "way_back.png",
        "README.md",
    ]
    assert result.out.splitlines() == [f"explained/digits/{name}" for name in names]
    assert all(Path(line).stat().st_size > 100 for line in result.out.splitlines())
    text = Path("explained/digits/README.md").read_text()
    assert "by the ideal denoiser of the training images" in text
    assert f"{recipe('digits').sampling.steps} steps of dpm-solver++2m" in text
