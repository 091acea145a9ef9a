"""The command `sfumato sweep`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def sweep(
    run: Annotated[Path, typer.Argument(help="Directory of the run.")],
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            help="Minutes that it may take; by default 5 % of the training time, and at least 1.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what RUN/sweep.json holds instead of tables.")
    ] = False,
) -> None:
    """Compare weights, guidance and steps of sampling by the distance to held-out images; what is
    surely better than the run's own setting becomes the default of `sfumato sample`.
    """
    from sfumato.observability.progress import ProgressBar
    from sfumato.process.signals import handled, poll
    from sfumato.reporting import write_report
    from sfumato.runs.sweep import sweep_run
    from sfumato.storage.output_paths import require_writable
    from sfumato.storage.run_directory import RunDirectory

    directory = RunDirectory.existing(run)
    require_writable(directory.path, directory.sweep)
    with handled(), ProgressBar("comparing settings of sampling") as bar:
        result = sweep_run(run, minutes=minutes, on_progress=bar.update, stop=poll)
    typer.echo(json.dumps(result.plain(), indent=1) if as_json else result.table())
    if not as_json:
        typer.echo(f"figures: {directory.sweep}; report: {write_report(run)}")
