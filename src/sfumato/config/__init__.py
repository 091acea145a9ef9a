"""Frozen dataclasses <-> plain data <-> YAML, with errors that name the key. Only this package
imports pydantic and yaml.

The dataclasses are the one schema: the parser, `config show`, `config schema` and the docs all read
it from them. Nothing is ever built from a name outside of their unions.
"""

from sfumato.config.kinds import Extensible, kind_of, members, with_shorthands
from sfumato.config.reader import (
    differences,
    dump_commented,
    dump_yaml,
    load_yaml,
    load_yaml_file,
    merge,
    with_overrides,
)
from sfumato.config.schema import (
    clear_model_cache,
    fill_former_defaults,
    json_schema,
    parse,
    plain,
    since,
)

__all__ = [
    "Extensible",
    "clear_model_cache",
    "differences",
    "dump_commented",
    "dump_yaml",
    "fill_former_defaults",
    "json_schema",
    "kind_of",
    "load_yaml",
    "load_yaml_file",
    "members",
    "merge",
    "parse",
    "plain",
    "since",
    "with_overrides",
    "with_shorthands",
]
