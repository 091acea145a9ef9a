"""The commands `sfumato train` and `sfumato resume`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sfumato.cli.procs import ProcsOption
from sfumato.distributed.launch import start_processes

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings such as budget.minutes=5; `sfumato config show` lists them.",
        metavar="[KEY=VALUE]...",
    ),
]


def train(
    source: Annotated[
        str, typer.Argument(help="A folder of images, a recipe's name, or a YAML file.")
    ],
    overrides: Overrides = None,
    run: Annotated[
        Path | None, typer.Option(help="Directory of the new run; by default runs/NAME.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Resume the run at --run if it is there: the same command begins a training "
            "and, after an interruption, resumes it.",
        ),
    ] = False,
    procs: ProcsOption = 1,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Say what would be trained, what it takes and whether it is long enough, and "
            "stop.",
        ),
    ] = False,
    world: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="With --dry-run: say what N processes would share and hold, 8 on each machine.",
        ),
    ] = None,
    config: Annotated[
        bool, typer.Option("--config", help="With --dry-run: print the configuration too, as YAML.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --dry-run: print everything as JSON.")
    ] = False,
) -> None:
    """Train a model from a folder of images, a recipe or a YAML file."""
    from sfumato.recipes import early_checks

    if (config or as_json or world is not None) and not dry_run:
        raise typer.BadParameter("--config, --json and --world belong to --dry-run")
    early_checks.require(source, overrides or ())
    if not dry_run:
        start_processes(procs)
        from sfumato import runs

        typer.echo(runs.train(source, overrides=overrides or (), run=run, resumes=resume))
        return
    from sfumato.runs.dry_run import plan

    dry_plan = plan(source, overrides=overrides or (), world=world)
    if as_json:
        typer.echo(json.dumps(dry_plan.plain(), indent=1))
    else:
        typer.echo(dry_plan.as_yaml() if config else "\n".join(dry_plan.lines()), nl=not config)


def resume(
    run: Annotated[Path, typer.Argument(help="Directory of the run.")],
    overrides: Overrides = None,
    step: Annotated[
        int | None,
        typer.Option(
            "--from",
            metavar="STEP",
            help="Go on from the checkpoint of this step; newer ones are set aside.",
        ),
    ] = None,
    accept_data_change: Annotated[
        bool,
        typer.Option(
            "--accept-data-change",
            help="Go on though the images have changed, for example since some were added: a new "
            "epoch of them begins.",
        ),
    ] = False,
    mirror: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Fetch the run from its copy here first (checkpoint.mirror): for a machine that "
            "has none.",
        ),
    ] = None,
    procs: ProcsOption = 1,
) -> None:
    """Resume a run from its latest checkpoint, bit for bit."""
    start_processes(procs)
    from sfumato import runs

    typer.echo(
        runs.resume(
            run,
            overrides=overrides or (),
            step=step,
            accepts_data=accept_data_change,
            mirror=mirror,
        )
    )
