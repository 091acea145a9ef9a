"""Write the reference pages docs/cli.md and docs/configuration.md from the program; with `--check`, compare them."""

from __future__ import annotations

import inspect
import json
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from typer.main import get_command

from sfumato.cli.main import app
from sfumato.cli.metavars import explain_values
from sfumato.config import kind_of, members, plain
from sfumato.config.descriptions import attribute_docs
from sfumato.config.kinds import SHORTHANDS, is_tagged
from sfumato.config.schema import config_fields
from sfumato.recipes.run import Run

CLI = """# Command line

Every command prints its options with `--help`. `--debug` is accepted at any position and shows a
traceback for every error; `--allow-hub` lets a run that was made elsewhere fetch the models that it
names; `--version` prints the version. Exit codes: 0 done, 1 a bug in sfumato, 2 an error that you can
fix, 3 training diverged or a model's output is not finite, 74 the last checkpoint could not be
written, 75 nothing moved any more, 76 another process of the run has ended; 129, 130 and 143
interrupted, with a checkpoint or finished images saved. Written by `docs/reference.py`.
"""
CONFIGURATION = """# Configuration

Every key of a run. Set keys on the command line (`sfumato train photos data.resolution=64
network.kind=dit`), in a YAML file, or in Python with `overrides=`. Recipes and presets set values
that differ from the defaults here: `sfumato config show SOURCE` prints them. Where a key takes one
of several kinds, `network.kind=dit` chooses one, or `network=dit` if no key of it is set too.
Written by `docs/reference.py`.
"""
BOUNDS = {"ge": "from {:g}", "gt": "above {:g}", "le": "up to {:g}", "lt": "below {:g}"}
NAMES: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    dict[str, Any]: "mapping",
}


def wrapped(text: str, first: str = "", other: str = "") -> str:
    """The text on lines of at most 100 characters; code is not broken."""
    parts = " ".join(text.split()).split("`")
    whole = "`".join(
        part.replace(" ", "\0") if number % 2 else part for number, part in enumerate(parts)
    )
    indents = {"initial_indent": first, "subsequent_indent": other}
    return textwrap.fill(
        whole, 100, break_long_words=False, break_on_hyphens=False, **indents
    ).replace("\0", " ")


def commands(group: Any, path: str) -> Iterator[str]:
    """A section for each command of a group."""
    for name, command in group.commands.items():
        full, hints = (
            f"{path} {name}",
            {} if hasattr(command, "commands") else get_type_hints(command.callback),
        )
        yield f"{'#' * len(full.split())} {full}\n\n{wrapped(command.help)}\n"
        if hasattr(command, "commands"):
            yield from commands(command, full)
            continue
        usages = {p: usage(p, hints) for p in command.params if p.name != "help"}
        given = " ".join(text for p, text in usages.items() if p.param_type_name == "argument")
        yield f"```\n{full} {given}{' ' * bool(given)}[OPTIONS]\n```\n"
        for p, text in usages.items():
            asked = p.required and p.param_type_name == "option"
            note = (
                " (required)"
                if asked
                else f" (default `{p.default}`)"
                if p.default not in (None, False)
                else ""
            )
            yield wrapped(f"`{text}`{note}: {p.help.removesuffix('.')}.", "- ", "  ")
        yield ""


def usage(p: Any, hints: dict[str, Any]) -> str:
    """An argument or option, as it is written on the command line."""
    if p.param_type_name == "argument":
        return str(p.metavar or (p.name.upper() if p.required else f"[{p.name.upper()}]"))
    value = (
        value_type(hints[p.name], {}).replace("`", "").removesuffix(" | null")
        if p.metavar is None
        else p.metavar
    )
    return f"{p.opts[0]} {value}".strip()


def configuration() -> Iterator[str]:
    """A section for each key that holds others, outermost first; what several keys may hold is described once."""
    sections: dict[tuple[type, ...], list[tuple[str, Any, Any]]] = {}
    queue: list[tuple[str, Any, Any]] = [("", Run, None)]
    for path, annotation, value in queue:  # grows as it is read
        options = tuple(members(annotation))
        sections.setdefault(options, []).append((path, annotation, value))
        if len(sections[options]) == 1:
            below = [
                (option, *pair)
                for option in options
                for pair in config_fields(option)
                if members(pair[1])
            ]
            queue += [
                (f"{path}.{field.name}".lstrip("."), hint, default(field, value, cls))
                for cls, field, hint in below
            ]
    places = {options: found[0][0] for options, found in sections.items()}
    for options, [(path, annotation, value), *others] in sections.items():
        yield f"## `{path}`\n" if path else "## A run\n"
        if others:
            yield (
                wrapped(
                    f"The same keys are under {', '.join(f'`{other}`' for other, _, _ in others)}."
                )
                + "\n"
            )
        for option in options:
            if is_tagged(annotation):
                yield f"### `{path}.kind={kind_of(option)}`\n"
            yield from described(option, value, places)


def described(cls: type, value: Any, places: dict[Any, str]) -> Iterator[str]:
    """The docstring of a dataclass, and a line on each of its fields; defaults are those of `value`, if it is one."""
    about, docs = inspect.cleandoc(cls.__dict__.get("__doc__") or ""), attribute_docs(cls)
    if not about.startswith(
        f"{cls.__name__}("
    ):  # the signature, which dataclasses write where there is no docstring
        yield wrapped(about.split("\n\n")[0]) + "\n"
    for field, hint in config_fields(cls):
        usual, notes = default(field, value, cls), [value_type(hint, places)]
        if usual is MISSING:
            notes.append("required")
        elif usual is None or is_tagged(hint) or not members(hint):
            said = kind_of(type(usual)) if members(hint) and usual is not None else plain(usual)
            notes.append(f"default `{said if isinstance(said, str) else json.dumps(said)}`")
        if names := field.metadata.get(SHORTHANDS):
            notes.append(f"short names {', '.join(f'`{name}`' for name in names)}")
        text = f": {docs[field.name].removesuffix('.')}." if field.name in docs else ""
        yield wrapped(f"`{field.name}` ({'; '.join(notes)}){text}", "- ", "  ")
    yield ""


def default(field: Any, holder: Any, cls: type) -> Any:
    """The default of a field of `cls`: its value in `holder`, if that is one."""
    usual = field.default if field.default_factory is MISSING else field.default_factory()
    return getattr(holder, field.name) if isinstance(holder, cls) else usual


def value_type(hint: Any, places: dict[Any, str]) -> str:
    """An annotation in words, with a link to what is described elsewhere."""
    origin, parts = get_origin(hint), get_args(hint)
    if options := tuple(members(hint)):
        kinds, place = "a `kind` and its keys" if is_tagged(hint) else "keys", places[options]
        return f"{kinds}, see [{place}](#{place.replace('.', '')})" + " | null" * (
            type(None) in parts
        )
    if origin is Annotated:
        bounds = [bound for item in parts[1:] for bound in getattr(item, "metadata", ())]
        said = [
            text.format(getattr(bound, key))
            for bound in bounds
            for key, text in BOUNDS.items()
            if hasattr(bound, key)
        ]
        return " ".join([value_type(parts[0], places), *said])
    if origin in (Literal, Union, types.UnionType):
        return " | ".join(
            f"`{part}`" if origin is Literal else value_type(part, places) for part in parts
        )
    if origin is tuple:
        several = [value_type(part, places) for part in parts if part is not Ellipsis]
        return f"list of {several[0]}" if Ellipsis in parts else f"[{', '.join(several)}]"
    if origin is dict and hint not in NAMES:
        return f"mapping of {value_type(parts[0], places)} to {value_type(parts[1], places)}"
    return NAMES[hint]


if __name__ == "__main__":
    pages = {
        "cli.md": commands(explain_values(get_command(app)), "sfumato"),
        "configuration.md": configuration(),
    }
    for name, parts in pages.items():
        text, path = (
            "\n".join([CLI if name == "cli.md" else CONFIGURATION, *parts]),
            Path(__file__).with_name(name),
        )
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            sys.exit(f"docs/{name} is out of date: run `python docs/reference.py`")
