"""The command `sfumato finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def finetune(
    model: Annotated[
        Path,
        typer.Argument(
            help="Directory of a run; or a model of diffusers, a folder (model_index.json) or "
            "OWNER/NAME on the Hugging Face hub."
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
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be trained and what it takes, and stop."),
    ] = False,
    config: Annotated[
        bool,
        typer.Option(
            "--config",
            help="With --dry-run: print the configuration too, as YAML for `sfumato train FILE`.",
        ),
    ] = False,
) -> None:
    """Fine-tune a run, or a model of diffusers, on images, by LoRA unless adapter.kind=none is
    set. The model is only read.
    """
    from sfumato.recipes import early_checks

    if config and not dry_run:
        raise typer.BadParameter("--config belongs to --dry-run")
    early_checks.require_keys(overrides or (), source)
    if not dry_run:
        from sfumato import runs

        typer.echo(runs.finetune(model, source, overrides=overrides or (), run=run))
        return
    from sfumato.runs.dry_run import plan_finetuning

    planned = plan_finetuning(model, source, overrides=overrides or ())
    typer.echo(planned.as_yaml() if config else "\n".join(planned.lines()), nl=not config)
