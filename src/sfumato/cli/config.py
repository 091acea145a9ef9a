"""The commands `sfumato recipes` and `sfumato config show | diff | validate | schema`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

config_app = typer.Typer(help="Inspect configurations.", no_args_is_help=True)
Source = Annotated[
    str, typer.Argument(help="A recipe's name, a YAML file, a run, or a folder of images.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings such as budget.minutes=5.", metavar="[KEY=VALUE]..."),
]


def recipes(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print names and summaries as JSON.")
    ] = False,
) -> None:
    """List the built-in recipes."""
    from sfumato.recipes.early_checks import SUMMARIES

    if as_json:
        typer.echo(json.dumps(SUMMARIES, indent=1))
        return
    width = max(map(len, SUMMARIES)) + 1
    for name, summary in SUMMARIES.items():
        typer.echo(f"{name:{width}} {summary}")


def _require(source: str, overrides: list[str] | None = None) -> None:
    """Refuse what is certain to be wrong before anything heavy is imported."""
    from sfumato.recipes import early_checks

    early_checks.require(source, overrides or ())


@config_app.command()
def show(
    source: Source,
    overrides: Overrides = None,
    comments: Annotated[bool, typer.Option(help="Explain each key in a comment.")] = True,
) -> None:
    """Print a configuration with every key, each explained in a comment."""
    _require(source, overrides)
    from sfumato import config
    from sfumato.recipes import resolve

    run = resolve(source, overrides or ())
    typer.echo(
        config.dump_commented(run) if comments else config.dump_yaml(config.plain(run)), nl=False
    )


@config_app.command()
def diff(old: Source, new: Source) -> None:
    """Print the settings in which two configurations differ."""
    _require(old)
    _require(new)
    from sfumato import config
    from sfumato.recipes import resolve

    for line in config.differences(config.plain(resolve(old)), config.plain(resolve(new))):
        typer.echo(line)


@config_app.command()
def validate(source: Source, overrides: Overrides = None) -> None:
    """Check a configuration; exit 2 and name the key if it is wrong."""
    _require(source, overrides)
    from sfumato.recipes import resolve

    typer.echo(f"{source}: valid ({resolve(source, overrides or ()).name})")


@config_app.command()
def schema() -> None:
    """Print the JSON schema of configurations, for an editor's completion."""
    from sfumato import config
    from sfumato.recipes import Run

    typer.echo(json.dumps(config.json_schema(Run), indent=1))
