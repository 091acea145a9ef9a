"""The command `sfumato finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sfumato.cli.model_options import LikeOption, VariantOption
from sfumato.cli.procs import ProcsOption
from sfumato.distributed.launch import start_processes


def finetune(
    model: Annotated[
        Path,
        typer.Argument(
            help="Directory of a run; a model of diffusers, a folder (model_index.json) or "
            "OWNER/NAME on the Hugging Face hub; or a single file (see --like)."
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
    lora: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="LoRA of diffusers, kohya or peft to go on from, with its rank, alpha and layers.",
        ),
    ] = None,
    partial: Annotated[
        bool,
        typer.Option("--partial", help="Go on from what fits of the LoRA, and leave out the rest."),
    ] = False,
    variant: VariantOption = "",
    like: LikeOption = None,
    procs: ProcsOption = 1,
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
    set. The model is only read. A run with a LoRA is continued.
    """
    from sfumato.recipes import early_checks

    if config and not dry_run:
        raise typer.BadParameter("--config belongs to --dry-run")
    if partial and lora is None:
        raise typer.BadParameter("--partial belongs to --lora")
    options: dict[str, Any] = {"lora": lora, "partial": partial, "variant": variant, "like": like}
    early_checks.require_keys(overrides or (), source)
    if not dry_run:
        start_processes(procs)
        from sfumato import runs

        typer.echo(runs.finetune(model, source, overrides=overrides or (), run=run, **options))
        return
    from sfumato.runs.dry_run import plan_finetuning

    planned = plan_finetuning(model, source, overrides=overrides or (), **options)
    typer.echo(planned.as_yaml() if config else "\n".join(planned.lines()), nl=not config)
