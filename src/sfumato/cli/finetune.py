"""The command `sfumato finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def finetune(
    model: Annotated[
        Path,
        typer.Argument(
            help="Directory of a run, or folder of a diffusers pipeline (model_index.json)."
        ),
    ],
    source: Annotated[str, typer.Argument(help="A folder of images, an archive or a table.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings such as adapter.rank=8 or budget.steps=500; `sfumato config show` lists "
            "them.",
            metavar="[KEY=VALUE]...",
        ),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Directory of the new run; by default runs/SOURCE-MODEL.")
    ] = None,
) -> None:
    """Fine-tune a run, or a model of diffusers, on images, by LoRA unless adapter.kind=none is
    set. The model is only read.
    """
    from sfumato.recipes import early_checks

    early_checks.require_keys(overrides or (), source)
    from sfumato import runs

    typer.echo(runs.finetune(model, source, overrides=overrides or (), run=run))
