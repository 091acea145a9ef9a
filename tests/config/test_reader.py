"""YAML without its traps, `a.b=c` settings that reach the key they name, and differences that a
person can read.
"""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato import config
from sfumato.config import reader
from sfumato.config.reader import MAX_BYTES, MAX_DEPTH, flatten
from sfumato.errors import ConfigError
from sfumato.recipes import resolve

BASE = {
    "seed": 0,
    "budget": {"steps": None, "minutes": 1},
    "schedule": {
        "kind": "warped",
        "schedule": {"kind": "linear"},
        "warp": {"kind": "shift", "factor": 3.0},
    },
    "spare": None,
    "sizes": [1, 2],
}


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config.load_yaml(text, where="file.yaml")
    assert str(caught.value).startswith("file.yaml: ")
    return str(caught.value)


def test_an_override_reaches_its_key_and_no_other() -> None:
    changed = config.with_overrides(BASE, ["schedule.warp.factor=2.5", "seed=7", "sizes=[3]"])
    assert changed["schedule"]["warp"] == {"kind": "shift", "factor": 2.5}
    assert changed["schedule"]["schedule"] == {"kind": "linear"}
    assert (changed["seed"], changed["sizes"]) == (7, [3])


def test_overrides_leave_the_base_alone() -> None:
    before = repr(BASE)
    config.with_overrides(BASE, ["schedule.warp.factor=2", "budget={steps: 3}", "spare.x=1"])
    assert repr(BASE) == before


def test_the_last_of_two_overrides_wins() -> None:
    assert config.with_overrides(BASE, ["seed=1", "seed=2"])["seed"] == 2


@pytest.mark.parametrize(
    "override", ["schedule.warp.kind=mode", "schedule.warp=mode", "schedule.warp={kind: mode}"]
)
def test_another_kind_empties_its_siblings(override: str) -> None:
    assert config.with_overrides(BASE, [override])["schedule"]["warp"] == {"kind": "mode"}


@pytest.mark.parametrize(
    "override", ["schedule.warp.kind=shift", "schedule.warp=shift", "schedule.warp={kind: shift}"]
)
def test_the_same_kind_keeps_them(override: str) -> None:
    assert config.with_overrides(BASE, [override])["schedule"]["warp"] == {
        "kind": "shift",
        "factor": 3.0,
    }


@pytest.mark.parametrize("kind", ["schedule.kind=karras", "schedule=karras"])
def test_settings_of_the_new_kind_may_stand_before_it_or_after(kind: str) -> None:
    for overrides in ([kind, "schedule.rho=5"], ["schedule.rho=5", kind]):
        assert config.with_overrides(BASE, overrides)["schedule"] == {"kind": "karras", "rho": 5}
    together = ["schedule={rho: 5}", "schedule.kind=karras"]
    assert config.with_overrides(BASE, together)["schedule"] == {"kind": "karras", "rho": 5}
    deep = ["schedule.warp.scale=1", "schedule.warp.kind=mode", "schedule.kind=other"]
    assert config.with_overrides(BASE, deep)["schedule"] == {
        "kind": "other",
        "warp": {"kind": "mode", "scale": 1},
    }


def test_null_empties_and_a_key_below_null_fills() -> None:
    assert config.with_overrides(BASE, ["budget.minutes=null"])["budget"]["minutes"] is None
    assert config.with_overrides(BASE, ["schedule=null"])["schedule"] is None
    assert config.with_overrides(BASE, ["spare.size=8"])["spare"] == {"size": 8}


def test_a_mapping_is_laid_over_and_a_list_replaces() -> None:
    changed = config.with_overrides(
        BASE, {"budget": {"steps": 5}, "schedule.warp.factor": 2, "sizes": [9]}
    )
    assert changed["budget"] == {"steps": 5, "minutes": 1}
    assert changed["schedule"]["warp"]["factor"] == 2
    assert changed["sizes"] == [9]


def test_overrides_as_mapping_and_as_text_agree() -> None:
    assert resolve("digits", ["budget.steps=6", "conditioner.category=null"]) == resolve(
        "digits", {"budget.steps": 6, "conditioner": {"category": None}}
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("budget.minutes.x=3", "budget.minutes.x=3: `budget.minutes` has no keys to set"),
        ("seed.x=3", "seed.x=3: `seed` has no keys to set"),
        ("sizes.0=3", "`sizes` has no keys to set"),
        ("seed", "'seed' is not an override"),
        ("=3", "'=3' is not an override"),
    ],
)
def test_a_path_that_leads_nowhere_is_named(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.with_overrides(BASE, [override])
    assert said in str(caught.value)


def test_a_key_below_one_that_is_absent_is_set_and_a_wrong_one_named(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text("name: small\ndata: {resolution: 8}\n")
    assert resolve(path, ["budget.steps=5"]).budget.steps == 5
    with pytest.raises(
        ConfigError, match=r"small.yaml: unknown key `bugdet` \(did you mean `budget`\?\)"
    ):
        resolve(path, ["bugdet.steps=5"])


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("compile=on", "on"),
        ("compile=off", "off"),
        ("name=no", "no"),
        ("name=2024-99-99", "2024-99-99"),
        ("optimizer.learning_rate=1e-4", 1e-4),
        ("optimizer.learning_rate=3", 3.0),
        ("network.multipliers=[1, 2]", (1, 2)),
        ("name=a=b", "a=b"),
        ("name='7'", "7"),
        ("batch_size=0x10", 16),
    ],
)
def test_values_are_read_as_a_person_means_them(override: str, read: object) -> None:
    run = resolve("digits", [override])
    value: object = run
    for name in override.partition("=")[0].split("."):
        value = getattr(value, name)
    assert value == read
    assert type(value) is type(read)


def test_yaml_is_read_as_plain_data() -> None:
    text = "a: {b: [1, 2.5, x, null, true, 'on']}\nc: on\n"
    assert config.load_yaml(text, where="x") == {
        "a": {"b": [1, 2.5, "x", None, True, "on"]},
        "c": "on",
    }


@pytest.mark.parametrize(
    "payload",
    [
        "!!python/object/apply:os.system ['touch /tmp/owned']",
        "!!python/name:os.system",
        "!!python/object:sfumato.errors.SfumatoError {}",
        "a: !!binary aGVsbG8=",
        "a: !!set {x}",
        "!env HOME",
        "a: !<tag:yaml.org,2002:python/tuple> [1]",
    ],
)
def test_tags_are_refused(payload: str) -> None:
    assert "a tag (" in refused(payload)


def test_aliases_and_alias_bombs_are_refused() -> None:
    assert "an alias (*x)" in refused("a: &x [1]\nb: *x")
    lines = ["a0: &a0 [lol]"] + [
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 11)
    ]
    assert "an alias (*a0)" in refused("\n".join(lines))
    assert "alias" in refused("a: &a {b: *a}")


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3", "x: {y: 1, y: 1}", "- {k: 1, 'k': 2}"])
def test_a_key_that_stands_twice_is_refused(text: str) -> None:
    assert "appears twice, line " in refused(text)


def test_keys_that_are_no_words_are_refused() -> None:
    assert "line 1" in refused("? [1, 2]\n: 3")


def test_nesting_has_a_floor() -> None:
    assert config.load_yaml("[" * 20 + "]" * 20, where="x") is not None
    assert f"more than {MAX_DEPTH} levels" in refused("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))
    assert f"more than {MAX_DEPTH} levels" in refused("{a: " * 5000 + "1" + "}" * 5000)


def test_size_has_a_ceiling() -> None:
    assert config.load_yaml("# " + "x" * (MAX_BYTES - 2), where="x") is None
    assert f"{MAX_BYTES + 1} characters" in refused("# " + "x" * (MAX_BYTES - 1))


def test_many_keys_are_compared_in_linear_time() -> None:
    compared = 0

    class Key(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    def scalar(value: str) -> yaml.ScalarNode:
        return yaml.ScalarNode("tag:yaml.org,2002:str", value, mark, mark)

    mark = yaml.Mark("x", 0, 0, 0, None, None)
    pairs = [(scalar(Key(f"a{number}")), scalar("1")) for number in range(10_000)]
    loader = reader._StricterSafeLoader("")
    assert (
        len(loader.construct_mapping(yaml.MappingNode("tag:yaml.org,2002:map", pairs, mark, mark)))
        == 10_000
    )
    assert compared < 100_000  # each with each is 50 million


@pytest.mark.parametrize(
    "text", ["a: [1", "\t- x", "a: 'b", "%YAML 9", "a: b: c", "--- 1\n--- 2", "\x00", "<<: 3"]
)
def test_what_is_no_yaml_says_so(text: str) -> None:
    assert "not a configuration: " in refused(text)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab:&*!?|>-[]{}#'\"%@, \n\t=<01.~\x00é", max_size=40))
def test_any_text_is_data_or_a_config_error(text: str) -> None:
    try:
        data = config.load_yaml(text, where="x")
    except ConfigError:
        return
    assert config.load_yaml(config.dump_yaml(data), where="again") == data or data != data


def test_a_file_must_hold_a_mapping_of_utf8(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("[1, 2]")
    with pytest.raises(
        ConfigError, match=r"run.yaml: does not contain a mapping of keys to values"
    ):
        config.load_yaml_file(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"run.yaml: cannot be read"):
        config.load_yaml_file(path)
    with pytest.raises(ConfigError, match=r"none.yaml: cannot be read"):
        config.load_yaml_file(tmp_path / "none.yaml")


def test_yaml_is_written_in_order_with_short_lists_on_a_line() -> None:
    text = config.dump_yaml({"z": 1, "a": {"list": [1, 2], "word": "on", "none": None, "ü": "é"}})
    assert text == "z: 1\na:\n  list: [1, 2]\n  word: 'on'\n  none: null\n  ü: é\n"


def test_differences_name_each_key_with_both_values() -> None:
    new = config.with_overrides(BASE, ["schedule.warp=mode", "seed=4", "sizes=[1]"])
    assert config.differences(BASE, BASE) == []
    assert config.differences(BASE, new) == [
        "seed: 0 -> 4",
        "schedule.warp.kind: shift -> mode",
        "schedule.warp.factor: 3.0 -> (absent)",
        "sizes: [1, 2] -> [1]",
    ]


def test_merging_lays_one_mapping_over_another_and_changes_neither() -> None:
    changes = {"budget": {"steps": 3}, "schedule": {"kind": "karras"}}
    result = config.merge(BASE, changes)
    assert result["budget"] == {"steps": 3, "minutes": 1}
    assert result["schedule"] == {"kind": "karras"}
    result["budget"]["steps"] = 99
    assert changes["budget"]["steps"] == 3
    assert BASE["budget"]["steps"] is None


def test_flattening() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [1]}}, "e": None}) == {
        "a.b": 1,
        "a.c.d": [1],
        "e": None,
    }


@pytest.mark.parametrize(
    "text", ["08", "1e5", "0o17", "2024e1", ".5", "1:30", "yes", "2024-05-01", "0x1F", "~", "+1"]
)
def test_texts_that_look_like_numbers_stay_texts(text: str) -> None:
    assert reader.load_yaml(reader.dump_yaml({"name": text}), where="here") == {"name": text}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("-3", -3),
        ("0o17", 15),
        ("0xff", 255),
        ("010", 10),
        ("1e-4", 1e-4),
        ("1.", 1.0),
        ("1:30", "1:30"),
    ],
)
def test_numbers_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found = reader.load_yaml(f"a: {text}", where="here")["a"]
    assert (found, type(found)) == (value, type(value))
