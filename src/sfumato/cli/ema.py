"""The command `sfumato ema`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

WIDTHS = [0.05, 0.075, 0.1, 0.15, 0.2, 0.25]


def ema(
    run: Annotated[
        Path, typer.Argument(help="Directory of the run; it was trained with post_hoc_ema.widths.")
    ],
    width: Annotated[
        list[float] | None, typer.Option(help="Widths to compare, as shares of the training.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the errors of each width as JSON.")
    ] = False,
) -> None:
    """Reconstruct averages of several widths after training, and compare their error on held-out
    images.
    """
    from sfumato.observability.tables import format_table
    from sfumato.runs.loading import width_errors

    errors = dict(width_errors(run, width or WIDTHS))
    if as_json:
        typer.echo(
            json.dumps(
                [{"width": ema_width, **figures} for ema_width, figures in errors.items()], indent=1
            )
        )
        return
    best = min(errors, key=lambda ema_width: errors[ema_width]["eps_mse"])
    lines = [("width", "noise MSE", "R2", "")]
    for ema_width, figures in errors.items():
        note = "least error" if ema_width == best else ""
        lines.append((f"{ema_width:g}", f"{figures['eps_mse']:.5f}", f"{figures['r2']:.4f}", note))
    typer.echo(format_table(lines))
    typer.echo(
        f"the least error need not look best: compare samples, e.g. sfumato sample {run} "
        f"--weights {best:g}"
    )
