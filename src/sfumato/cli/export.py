"""The command `sfumato export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def export(
    run: Annotated[Path, typer.Argument(help="Directory of the run.")],
    format: Annotated[
        str,
        typer.Option(
            help="lora-diffusers, lora-kohya (also for ComfyUI), lora-peft: a LoRA alone; "
            "diffusers: a pipeline's folder, a LoRA merged; single-file: one file of Stable "
            "Diffusion's layout; bundle: a folder that sfumato.load opens anywhere; onnx: the "
            "network with a runner on onnxruntime; embedding: the vectors of a textual inversion; "
            "controlnet: a ControlNet of diffusers; control-lora: a file that sample --control reads."
        ),
    ],
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"],
        typer.Option(help="Precision of the file; what rounding loses is printed."),
    ] = "float32",
    out: Annotated[
        Path | None,
        typer.Option(help="File or folder to write; by default RUN/exports/FORMAT-STEP."),
    ] = None,
    weights: Annotated[
        Literal["auto", "best", "ema", "raw"],
        typer.Option(
            help="ema: averaged weights; raw: the last step's; best: those that the verdict names; "
            "auto: best where the last step is worse, else ema."
        ),
    ] = "auto",
) -> None:
    """Write what a run has learned for other programs, and compare it with the run; prints the
    path.
    """
    from sfumato.runs.export import export

    typer.echo(export(run, format, out, dtype, weights=weights))
