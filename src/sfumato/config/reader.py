"""YAML files, `a.b=c` overrides and differences between two configurations."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import yaml

from sfumato.config.aliases import current_kind
from sfumato.config.descriptions import attribute_docs
from sfumato.config.kinds import TAG, is_tagged, kind_of
from sfumato.config.schema import config_fields, plain
from sfumato.errors import ConfigError

MAX_BYTES, MAX_DEPTH, MAX_DIGITS = 1 << 20, 24, 100


class _StricterSafeLoader(yaml.SafeLoader):
    """The loader of `yaml.safe_load` without tags, aliases, duplicate keys and unlimited nesting: a
    configuration needs none of them.
    """

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"an alias (*{event.anchor}); write the value out")
        if getattr(event, "tag", None):
            raise yaml.YAMLError(f"a tag ({event.tag}); write the plain value")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"more than {MAX_DEPTH} levels of nesting")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(
                    f"a key that is not a single word, line {key.start_mark.line + 1}"
                )
            if key.value in keys:
                raise yaml.YAMLError(
                    f"the key {key.value!r} appears twice, line {key.start_mark.line + 1}"
                )
            keys.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: Any) -> int:
        """Return a number in the notation of YAML 1.2: 12, 0o14 or 0xc, and nothing by sixties."""
        text = self.construct_scalar(node)
        if len(text) > MAX_DIGITS:
            raise yaml.YAMLError(f"a number of {len(text)} digits, line {node.start_mark.line + 1}")
        sign, digits = (-1, text[1:]) if text[0] == "-" else (1, text.lstrip("+"))
        bases = {"0o": 8, "0x": 16}
        return sign * int(digits[2:] if digits[:2] in bases else digits, bases.get(digits[:2], 10))

    def construct_number(self, node: Any) -> float:
        """Return a number with a point or an exponent, in the notation of YAML 1.2."""
        text = self.construct_scalar(node)
        if len(text) > MAX_DIGITS:
            raise yaml.YAMLError(f"a number of {len(text)} digits, line {node.start_mark.line + 1}")
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


# `compile: on`, `name: 2024-05-01` and `1:30` are words here: of YAML's own words only true, false and
# null are more, and numbers are those of YAML 1.2 (section 10.3.2).
_BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float"))
_REPLACED = (_BOOL, _INT, _FLOAT, "tag:yaml.org,2002:timestamp")
_StricterSafeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_SCALARS = (
    (_BOOL, "true|false|True|False", "tfTF"),
    (_INT, "[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        _FLOAT,
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
)
for _tag, _pattern, _first in _SCALARS:
    _StricterSafeLoader.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})$"), list(_first))
_StricterSafeLoader.add_constructor(_INT, _StricterSafeLoader.construct_integer)
_StricterSafeLoader.add_constructor(_FLOAT, _StricterSafeLoader.construct_number)


def load_yaml(text: str, *, where: str) -> Any:
    """Parse YAML text into plain data.

    Raises:
        ConfigError: if it is not YAML, is longer than 2^20 characters, is nested too deeply, or
            uses tags, aliases or a key twice.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(
            f"{len(text)} characters of YAML",
            where=where,
            hint="a configuration has a few hundred lines",
        )
    try:
        return _StricterSafeLoader(text).get_single_data()
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(
            f"not a configuration: {' '.join(str(error).split())}",
            where=where,
            hint="write keys and plain values; `sfumato config show RECIPE` prints an example",
        ) from None


def load_yaml_file(path: Path) -> dict[str, Any]:
    """Load the mapping in a YAML file.

    Raises:
        ConfigError: if the file cannot be read, or does not hold a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", where=str(path)) from None
    data = load_yaml(text, where=str(path))
    if not isinstance(data, dict):
        raise ConfigError(
            "does not contain a mapping of keys to values",
            where=str(path),
            hint="begin with e.g. `recipe: digits`",
        )
    return data


def dump_yaml(data: Any) -> str:
    """Write plain data as YAML, keys in their own order, lists in brackets."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def dump_commented(value: Any, indent: int = 0) -> str:
    """Write a configuration as YAML with a comment on each key, from its dataclass's docstring."""
    cls: Any = type(value)
    texts, lines, margin = attribute_docs(cls), list[str](), " " * indent
    for entry, hint in config_fields(cls):
        if entry.name in texts:
            lines += textwrap.wrap(
                f"{entry.name}: {texts[entry.name]}",
                98 - indent,
                initial_indent=f"{margin}# ",
                subsequent_indent=f"{margin}# ",
            )
        held = getattr(value, entry.name)
        if is_dataclass(held):
            kind = [f"{margin}  {TAG}: {kind_of(type(held))}"] if is_tagged(hint) else []
            below = dump_commented(held, indent + 2).splitlines()
            lines += [f"{margin}{entry.name}:" + ("" if kind or below else " {}"), *kind, *below]
        else:
            lines += textwrap.indent(dump_yaml({entry.name: plain(held)}), margin).splitlines()
    return "".join(f"{line}\n" for line in lines)


class _Dumper(yaml.SafeDumper):
    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)


_Dumper.add_representer(list, _represent_list)
# a text that looks like a number of YAML 1.2 is quoted, beside those that YAML 1.1 would misread
for _tag, _pattern, _first in _SCALARS:
    _Dumper.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})$"), list(_first))


def with_overrides(
    data: Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any]
) -> dict[str, Any]:
    """Return the configuration with `a.b=c` settings applied; values are read as YAML.

    Another `kind` empties the object that it replaces, since its other keys belonged to the old
    kind. So an object set as a whole is applied before its parts, in whatever order they are given.

    Raises:
        ConfigError: for a setting without "=", or a path that leads through a value that has no
            keys.
    """
    result = _copy(data)
    for path, value in sorted(_parse_overrides(overrides), key=_set_order):
        *parents, last = path.split(".")
        target = result
        for depth, key in enumerate(parents):
            # absent keys have defaults, unknown ones are refused by `parse`
            if target.get(key) is None:
                target[key] = {}
            if isinstance(target[key], str):  # a kind, which stands for the whole object
                target[key] = {TAG: target[key]}
            target = target[key]
            if not isinstance(target, dict):
                raise ConfigError(
                    f"`{'.'.join(parents[: depth + 1])}` has no keys to set",
                    where=f"{path}={value}",
                )
        if last == TAG and not _same_kind(target.get(TAG), value):
            target.clear()
        current = target.get(last)
        if isinstance(current, dict) and TAG in current and isinstance(value, str):
            value = {TAG: value}
        target[last] = _merge(current, value)
    output: dict[str, Any] = result
    return output


def _set_order(setting: tuple[str, Any]) -> tuple[int, bool]:
    """Return a sort key: what is set whole comes before its parts, and of those the kind first."""
    path = setting[0]
    return path.removesuffix(f".{TAG}").count("."), not path.endswith(f".{TAG}")


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the nested mapping `changes` laid over it."""
    result: dict[str, Any] = _merge(_copy(base), _copy(changes))
    return result


def _merge(base: Any, changes: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    if TAG in changes and not _same_kind(changes[TAG], base.get(TAG)):
        return changes
    return {**base, **{key: _merge(base.get(key), value) for key, value in changes.items()}}


def _same_kind(one: Any, other: Any) -> bool:
    return (
        isinstance(one, str) and isinstance(other, str) and current_kind(one) == current_kind(other)
    )


def _parse_overrides(overrides: Sequence[str] | Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        yield from overrides.items()
        return
    for item in overrides:
        path, equals, text = item.partition("=")
        if not equals or not path:
            raise ConfigError(
                f"{item!r} is not an override",
                where="overrides",
                hint="write key=value, e.g. budget.minutes=5",
            )
        yield path, load_yaml(text, where=item)


def _copy(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _copy(value) for key, value in data.items()}
    return [_copy(item) for item in data] if isinstance(data, list) else data


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings: {"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(data, dict):
        return {prefix[:-1]: data}
    return {
        key: value
        for name, child in data.items()
        for key, value in flatten(child, f"{prefix}{name}.").items()
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a line "key: old -> new" for every setting that differs."""
    before, after = flatten(old), flatten(new)
    absent = "(absent)"
    return [
        f"{key}: {before.get(key, absent)} -> {after.get(key, absent)}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key, absent) != after.get(key, absent)
    ]
