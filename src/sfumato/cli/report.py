"""The command `sfumato report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="Directory of the run.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write; by default RUN/report.html.")
    ] = None,
    half: Annotated[
        Path | None,
        typer.Option(
            help="Directory of a run with the same settings and data.half=first or second: says "
            "whether more images would help."
        ),
    ] = None,
) -> None:
    """Write the report of a run, finished or not: when to stop, whether it copies, how good it is;
    prints the path.
    """
    from sfumato.reporting import compare_with_half, write_report

    if half is not None:
        typer.echo(compare_with_half(run, half).sentence())
    typer.echo(write_report(run, out))
