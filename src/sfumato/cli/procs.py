"""The option --procs."""

from __future__ import annotations

from typing import Annotated

import typer

ProcsOption = Annotated[
    int,
    typer.Option(
        "--procs",
        metavar="N",
        help="Work in N processes of this machine: one for each GPU, or for each few cores. The "
        "result is the same.",
    ),
]
