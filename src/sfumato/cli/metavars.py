"""The kinds of values in help texts, in plain words: `<number>`, not `<float range>`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

# a flag takes no value
WORDS = {int: "<integer>", float: "<number>", str: "<text>", Path: "<path>", bool: ""}


def in_words(annotation: Any) -> str | None:
    """Return what an option of a type takes, or None to leave its text as it is."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return in_words(parts[0])
    if origin in (Union, UnionType):
        parts = tuple(part for part in parts if part is not NoneType)
        return in_words(parts[0]) if len(parts) == 1 else None
    if origin is list:
        inner = in_words(parts[0])
        return None if inner is None else f"{inner} ..."
    if origin is tuple:
        each = [in_words(part) for part in parts]
        return None if None in each else " ".join(map(str, each))
    return WORDS.get(annotation)


def explain_values(command: Any) -> Any:
    """Name the values of all options of a command and of its subcommands; return the command."""
    for below in getattr(command, "commands", {}).values():
        explain_values(below)
    hints = _hints(command.callback)
    for parameter in command.params:
        if (
            parameter.param_type_name == "option"
            and parameter.metavar is None
            and parameter.name in hints
        ):
            parameter.metavar = in_words(hints[parameter.name])
    return command


def _hints(function: Callable[..., Any] | None) -> dict[str, Any]:
    return {} if function is None else get_type_hints(function)
