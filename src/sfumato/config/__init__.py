"""Frozen dataclasses <-> plain data <-> YAML, with errors that name the key. The only room that knows pydantic and yaml.

The dataclasses are the one schema: the parser, `config show`, `config schema` and the docs all read it from them. Nothing is
ever built from a name that is not in one of their unions.
"""

from sfumato.config.reader import differences, dump_yaml, load_yaml, load_yaml_file, merged, with_overrides
from sfumato.config.schema import json_schema, parse, plain

__all__ = [
    "differences",
    "dump_yaml",
    "json_schema",
    "load_yaml",
    "load_yaml_file",
    "merged",
    "parse",
    "plain",
    "with_overrides",
]
