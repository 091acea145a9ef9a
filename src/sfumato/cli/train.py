"""sfumato train, sfumato resume."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings such as budget.minutes=5; `sfumato config show` lists them.")
]


def train(
    source: Annotated[str, typer.Argument(help="A folder of pictures, a recipe's name, or a YAML file.")],
    overrides: Overrides = None,
    run: Annotated[Path | None, typer.Option(help="Directory of the new run; by default runs/NAME.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be trained, and stop.")] = False,
) -> None:
    """Train a model from a folder of pictures, a recipe or a YAML file."""
    from sfumato.recipes import launch

    if dry_run:
        typer.echo(launch.describe(source, overrides=overrides or ()))
        return
    typer.echo(launch.train(source, overrides=overrides or (), run=run))


def resume(
    run: Annotated[Path, typer.Argument(help="Directory of the run.")],
    overrides: Overrides = None,
) -> None:
    """Go on with a run from its newest checkpoint, bit for bit."""
    from sfumato.recipes import launch

    typer.echo(launch.resume(run, overrides=overrides or ()))
