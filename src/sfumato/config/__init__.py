"""Frozen dataclasses <-> plain data <-> YAML, with errors that name the key. Only this package
imports pydantic and yaml.

The dataclasses are the one schema: the parser, `config show`, `config schema` and the docs all read
it from them. Nothing is ever built from a name outside of their unions.
"""

from sfumato.config.kinds import Extensible, kind_of, members, named
from sfumato.config.reader import (
    differences,
    dump_commented,
    dump_yaml,
    load_yaml,
    load_yaml_file,
    merged,
    with_overrides,
)
from sfumato.config.schema import as_before, forget_models, json_schema, parse, plain, since

__all__ = [
    "Extensible",
    "as_before",
    "differences",
    "dump_commented",
    "dump_yaml",
    "forget_models",
    "json_schema",
    "kind_of",
    "load_yaml",
    "load_yaml_file",
    "members",
    "merged",
    "named",
    "parse",
    "plain",
    "since",
    "with_overrides",
]
