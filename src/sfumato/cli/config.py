"""sfumato recipes, sfumato config show | diff | validate | schema."""

from __future__ import annotations

import json
from typing import Annotated

import typer

config_app = typer.Typer(help="Look at configurations.", no_args_is_help=True)
Source = Annotated[str, typer.Argument(help="A recipe's name, a YAML file, a run, or a folder of pictures.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings such as budget.minutes=5.")]


def recipes() -> None:
    """List the built-in recipes."""
    from sfumato.recipes import RECIPES

    width = max(map(len, RECIPES)) + 1
    for name, function in RECIPES.items():
        typer.echo(f"{name:{width}} {(function.__doc__ or '').splitlines()[0]}")


@config_app.command()
def show(source: Source, overrides: Overrides = None) -> None:
    """Print a configuration with every key."""
    from sfumato import config
    from sfumato.recipes import resolve

    typer.echo(config.dump_yaml(config.plain(resolve(source, overrides or ()))), nl=False)


@config_app.command()
def diff(old: Source, new: Source) -> None:
    """Print the settings in which two configurations differ."""
    from sfumato import config
    from sfumato.recipes import resolve

    for line in config.differences(config.plain(resolve(old)), config.plain(resolve(new))):
        typer.echo(line)


@config_app.command()
def validate(source: Source, overrides: Overrides = None) -> None:
    """Check a configuration; exit 2 and name the key if it is wrong."""
    from sfumato.recipes import resolve

    typer.echo(f"{source}: valid ({resolve(source, overrides or ()).name})")


@config_app.command()
def schema() -> None:
    """Print the JSON schema of configurations, for an editor's completion."""
    from sfumato import config
    from sfumato.recipes import Run

    typer.echo(json.dumps(config.json_schema(Run), indent=1))
