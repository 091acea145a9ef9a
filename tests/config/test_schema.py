"""Dataclasses -> plain data -> dataclasses loses nothing, and what is wrong is named, with the
nearest legal name.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato import config
from sfumato.conditioners import LearnedTextConfig
from sfumato.config.schema import config_fields, is_tagged, members
from sfumato.errors import ConfigError, SfumatoError
from sfumato.recipes import RECIPES, Run, recipe, resolve

NEEDED = {
    **{
        kind: {"path": "images"}
        for kind in ("Folder", "HuggingFace", "Npz", "Parquet", "WebDataset", "Zip")
    },
    "PretrainedAutoencoder": {"path": "somewhere"},
    "PipelineTextConfig": {"path": "somewhere"},
    "ClassLabelsConfig": {"names": ["a", "b"]},
    "Tabulated": {"alphas": [1.0, 0.5, 0.0], "sigmas": [0.0, 0.5, 1.0]},
    "Warped": {"schedule": "Karras", "warp": "Shift"},
    "ZeroTerminalSNR": {"schedule": "ScaledLinear"},
}


def unions(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, type]]:
    """(path, annotation, member) for every member of every union that a configuration reaches, one
    union deep.
    """
    for field, hint in config_fields(cls):
        path = f"{prefix}{field.name}"
        if is_tagged(hint):
            yield from ((path, hint, member) for member in members(hint))
        else:
            for member in members(hint):
                yield from unions(member, f"{path}.")


EVERY_MEMBER = {f"{path}={member.__name__}": (path, member) for path, _, member in unions(Run)}


def at(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = getattr(value, name)
    return value


def wrong(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve("digits", overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_plain_data_and_yaml(name: str) -> None:
    run = recipe(name)
    text = config.dump_yaml(config.plain(run))
    assert config.parse(Run, config.plain(run)) == run
    assert config.parse(Run, config.load_yaml(text, where="here")) == run


@pytest.mark.parametrize("case", EVERY_MEMBER)
def test_every_member_of_every_union_survives(case: str) -> None:
    path, member = EVERY_MEMBER[case]
    needed = NEEDED.get(member.__name__, {})
    within = (
        {"sampling.schedule": "linear-betas"} if member.__name__ in ("Epsilon", "Churn") else {}
    )  # not from pure noise
    run = resolve("digits", {path: {"kind": config.kind_of(member), **needed}, **within})
    assert type(at(run, path)) is member
    again = config.parse(Run, config.load_yaml(config.dump_yaml(config.plain(run)), where="here"))
    assert again == run
    assert type(at(again, path)) is member


def test_the_unions_are_the_ones_we_think() -> None:
    paths = {path for path, _ in EVERY_MEMBER.values()}
    assert {
        "data.source",
        "objective.schedule",
        "objective.weighting",
        "sampling.sampler",
        "sampling.schedule",
        "ema",
    } < paths
    assert len(EVERY_MEMBER) > 50


def test_a_member_whose_name_begins_with_anothers_is_not_mistaken_for_it() -> None:
    run = resolve("digits", ["objective.schedule={kind: linear-betas, beta_end: 0.03}"])
    assert config.plain(run)["objective"]["schedule"] == {
        "kind": "linear-betas",
        "beta_start": 1e-4,
        "beta_end": 0.03,
        "steps": 1000,
    }


def test_values_of_nested_unions_survive() -> None:
    run = resolve(
        "digits",
        ["sampling.sampler={kind: churn, sampler: {kind: runge-kutta, method: rk4}, gamma: 0.1}"],
    )
    assert run.sampling.sampler.sampler.method == "rk4"
    assert run.sampling.sampler.high == float("inf")
    assert (
        config.parse(Run, config.load_yaml(config.dump_yaml(config.plain(run)), where="here"))
        == run
    )


@dataclasses.dataclass(frozen=True)
class Loud:
    volume: float = 1.0
    tags: tuple[str, ...] = ("a",)


@dataclasses.dataclass(frozen=True)
class Quiet:
    hours: tuple[int, int] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Heard:
    sound: Loud | Quiet


@dataclasses.dataclass(frozen=True)
class Box:
    size: int
    sound: Loud | Quiet = Quiet()
    spare: Loud | None = None
    either: Loud | Quiet | None = None


def test_kind_is_written_where_a_union_needs_it_and_only_there() -> None:
    assert config.plain(Box(1, spare=Loud())) == {
        "size": 1,
        "sound": {"kind": "quiet", "hours": [1, 2]},
        "spare": {"volume": 1.0, "tags": ["a"]},
        "either": None,
    }


@pytest.mark.parametrize(
    "box",
    [Box(2), Box(3, Loud(2.5, ()), Loud(0.0, ("x", "y")), Quiet((5, 6))), Box(4, either=Loud())],
)
def test_tuples_come_back_as_tuples(box: Box) -> None:
    assert config.parse(Box, config.plain(box)) == box


def test_a_name_stands_for_a_whole_member() -> None:
    assert config.parse(Box, {"size": 1, "sound": "Loud"}) == Box(1, Loud())


def test_an_unknown_key_is_named_with_the_nearest() -> None:
    assert "digits: unknown key `budget.stpes` (did you mean `budget.steps`?)" in wrong(
        "budget.stpes=3"
    )
    assert "unknown key `sed` (did you mean `seed`?)" in wrong("sed=1")
    assert "unknown key `Budget` (did you mean `budget`?)" in wrong("Budget=1")


def test_only_keys_of_the_kind_at_hand_are_offered() -> None:
    assert (
        "unknown key `objective.schedule.beta_mn` (did you mean `objective.schedule.beta_min`?)"
        in wrong("objective.schedule={kind: variance-preserving, beta_mn: 1}")
    )
    assert "beta_min" not in wrong("objective.schedule={kind: karras, beta_mn: 1}")


def test_all_that_is_wrong_is_said_at_once() -> None:
    said = wrong("seed=x", "budget.stpes=3", "ema.kind=slow")
    assert "`seed` = 'x': input should be a valid integer" in said
    assert "unknown key `budget.stpes`" in said
    assert "`ema` = 'slow' is not one of power, exponential" in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("batch_size=many", "`batch_size` = 'many': input should be a valid integer"),
        ("data.resolution=8.5", "`data.resolution` = 8.5: input should be a valid integer"),
        ("data.channels=rgb", "`data.channels` = 'rgb': input should be a valid integer"),
        ("data.bits=12", "`data.bits` = 12: input should be 8 or 16"),
        (
            "data.augment.flip=up",
            "`data.augment.flip` = 'up': input should be 'none', 'horizontal', 'vertical' or "
            "'both'",
        ),
        (
            "precision=float16",
            "`precision` = 'float16': input should be 'auto', 'float32', 'bfloat16' or 'float8'",
        ),
        (
            "network.multipliers=[1, a]",
            "`network.multipliers.1` = 'a': input should be a valid integer",
        ),
        ("data.background=[1, 2]", "`data.background.2` is missing"),
        ("name=[1]", "`name` = [1]: input should be a valid string"),
        ("budget=null", "`budget` = None: must be a mapping of keys to values"),
        ("budget=5", "`budget` = 5: must be a mapping of keys to values"),
        (
            "objective.schedule=null",
            "`objective.schedule` = None: must be a mapping of keys to values",
        ),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(override: str, said: str) -> None:
    assert said in wrong(override)
    assert "hint: `sfumato config show RECIPE` prints every key" in wrong(override)


def test_an_unknown_kind_is_named_with_the_nearest_and_all_others() -> None:
    said = wrong("objective.weighting=MinSRN")
    assert (
        "`objective.weighting` = 'MinSRN' is not one of native, uniform-epsilon, min-snr, "
        "sigmoid, edm, target-space" in said
    )
    assert "did you mean 'min-snr'?" in said


def test_without_a_kind_it_is_the_defaults() -> None:
    """So what was written before there was a choice is still read."""
    assert config.parse(Box, {"size": 1, "sound": {"hours": [3, 4]}}) == Box(1, Quiet((3, 4)))
    with pytest.raises(ConfigError, match=r"unknown key `sound\.volume`"):
        config.parse(Box, {"size": 1, "sound": {"volume": 2}})
    assert config.parse(Box, {"size": 1, "either": {"volume": 2}}).either == Loud(
        2
    )  # the first, where there is none by default
    assert resolve("digits", ["conditioner.text.length=48"]).conditioner.text == LearnedTextConfig(
        length=48
    )
    assert resolve("digits", ["conditioner.text={}"]).conditioner.text == LearnedTextConfig()
    old = config.plain(resolve("digits"))
    del old["network"]["kind"]
    assert config.parse(Run, old) == resolve("digits")


def test_a_missing_kind_and_a_missing_key_are_named() -> None:
    with pytest.raises(ConfigError, match="`sound` needs a `kind`"):
        config.parse(Heard, {"sound": {"volume": 2}})
    with pytest.raises(ConfigError, match="box: `size` is missing"):
        config.parse(Box, {}, where="box")
    assert "`data.source.path` is missing" in wrong("data.source.kind=folder")


@pytest.mark.parametrize("data", [5, None, [], "digits"])
def test_what_is_no_mapping_says_so(data: object) -> None:
    with pytest.raises(ConfigError, match=r"is not a mapping of keys to values"):
        config.parse(Run, data)


@pytest.mark.parametrize("key", ["_target_", "class_path", "__class__", "_partial_", "init_args"])
@pytest.mark.parametrize("where", ["", "sampling.sampler.", "data.source.", "network."])
def test_keys_that_build_objects_elsewhere_are_unknown_here(key: str, where: str) -> None:
    assert f"unknown key `{where}{key}`" in wrong(f"{where}{key}=os.system")


@pytest.mark.parametrize(
    "kind", ["os.system", "sfumato.diffusion.Linear", "builtins.eval", "Run", "_DiscreteBetas"]
)
def test_a_kind_outside_the_union_builds_nothing(kind: str) -> None:
    assert f"`objective.schedule` = '{kind}' is not one of linear," in wrong(
        f"objective.schedule={kind}"
    )


def test_errors_of_the_dataclass_itself_come_through() -> None:
    assert wrong("data.holdout=2").startswith(
        "digits: `data.holdout` = 2: input should be less than 1"
    )
    assert wrong("data.channels=65").startswith(
        "data: resolution = 8, channels = 65, holdout = 0.15"
    )
    assert wrong("data.augment.crop=1").startswith(
        "digits: `data.augment.crop` = 1: input should be less than 1"
    )
    with pytest.raises(SfumatoError, match="not a schedule"):
        resolve("digits", ["objective.schedule={kind: tabulated, alphas: [1], sigmas: [0]}"])


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["Loud", "Quiet", "kind"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["size", "sound", "spare", "either", "kind", "volume", "Tags", "hours", ""]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(PLAIN)
def test_any_data_is_a_configuration_or_a_config_error(data: object) -> None:
    try:
        box = config.parse(Box, data)
    except ConfigError as error:
        said = str(error)
    else:
        said = ""
        assert repr(config.parse(Box, config.plain(box))) == repr(box)
    assert "_plain" not in said  # names of generated models are nobody's business
    assert "_tagged" not in said


def test_the_json_schema_knows_every_key_and_every_kind() -> None:
    schema = config.json_schema(Run)
    definitions = schema["$defs"]
    assert set(schema["properties"]) == {field.name for field in dataclasses.fields(Run)}
    assert schema["required"] == ["name"]
    assert schema["additionalProperties"] is False

    def resolved(part: dict[str, Any]) -> dict[str, Any]:
        if "anyOf" in part:  # or null
            part = next(option for option in part["anyOf"] if option != {"type": "null"})
        return definitions[part["$ref"].removeprefix("#/$defs/")] if "$ref" in part else part

    for path, _, member in unions(Run):
        part = schema
        for name in path.split("."):
            part = resolved(resolved(part)["properties"][name])
        options = [resolved(option) for option in resolved(part)["oneOf"]]
        match = [
            option
            for option in options
            if option["properties"]["kind"]["const"] == config.kind_of(member)
        ]
        assert len(match) == 1, (path, member)
        assert match[0]["additionalProperties"] is False
        assert set(match[0]["properties"]) == {
            "kind",
            *(field.name for field, _ in config_fields(member)),
        }


def test_every_reference_in_the_json_schema_leads_somewhere() -> None:
    schema = config.json_schema(Run)

    def references(part: Any) -> Iterator[str]:
        if isinstance(part, dict):
            yield from ([part["$ref"]] if "$ref" in part else [])
        for child in (
            part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        ):
            yield from references(child)

    found = set(references(schema))
    assert found
    assert found <= {f"#/$defs/{name}" for name in schema["$defs"]}
