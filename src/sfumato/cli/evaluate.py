"""The command `sfumato evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sfumato.cli.model_options import LikeOption, LoraOption, PartialOption, VariantOption
from sfumato.cli.procs import ProcsOption
from sfumato.cli.sample_options import parse_loras
from sfumato.distributed.launch import start_processes

FEATURES_HELP = (
    "Network in whose features images are compared: auto (EfficientNet-Lite0 if it is installed), "
    "random, a .safetensors file of FID's Inception-v3, or the folder of a vision transformer such as "
    "DINOv2."
)


def evaluate(
    run: Annotated[
        Path,
        typer.Argument(
            help="Directory of the run; a model of diffusers, as a folder or OWNER/NAME on the "
            "Hugging Face hub; or a single file (see --like)."
        ),
    ],
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Images to compare with, with captions if the model reads text; by default those "
            "that the run was trained on.",
        ),
    ] = None,
    caption: Annotated[
        str | None, typer.Option(help="Caption of all reference images that have none.")
    ] = None,
    like: LikeOption = None,
    variant: VariantOption = "",
    lora: LoraOption = None,
    partial: PartialOption = False,
    num: Annotated[
        int, typer.Option(min=2, help="Images to generate for each guidance scale.")
    ] = 500,
    guidance: Annotated[
        list[float] | None,
        typer.Option(
            help="Scales to compare, by default 1 and the run's own; adherence to contexts is "
            "measured at the largest."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the generated images.")] = 1,
    features: Annotated[
        str,
        typer.Option(metavar="NETWORK", help=FEATURES_HELP),
    ] = "auto",
    statistics: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            help="Mean and covariance (mu, sigma) that the Fréchet distance compares with, as "
            "pytorch-fid and ADM's evaluation share them; by default those of the training images, "
            "which are written beside the figures.",
        ),
    ] = None,
    precision: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Precision inside the network.")
    ] = "float32",
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the network first: pays for many images.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="JSON file; by default RUN/evaluation/evaluation.json, or for a diffusers "
            "pipeline in generated/NAME/evaluation/."
        ),
    ] = None,
    procs: ProcsOption = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what the file holds instead of tables.")
    ] = False,
) -> None:
    """Compare samples with real held-out and training images: distances, quality, variety, copies,
    category accuracy, and whether contexts work.
    """
    start_processes(procs)
    from sfumato.distributed import joined
    from sfumato.observability.progress import ProgressBar
    from sfumato.process.signals import handled
    from sfumato.runs.evaluation import evaluate_run, evaluation_folder
    from sfumato.storage.output_paths import require_writable

    loras = parse_loras(lora)
    target = out or evaluation_folder(run, reference, loras) / "evaluation.json"
    with handled(), joined() as world, ProgressBar("evaluating") as bar:
        report, remarks = evaluate_run(
            run,
            reference=reference,
            caption=caption,
            like=like,
            variant=variant,
            loras=loras,
            partial=partial,
            num=num,
            guidance=guidance or (),
            seed=seed,
            features=features,
            statistics=statistics,
            precision=precision,
            compile=compile,
            on_progress=bar.update,
            before_work=lambda: world.on_first(
                lambda: str(require_writable(target.parent, target))
            ),
        )
        world.on_first(lambda: report.save(target))
    if as_json:
        typer.echo(report.json())
        return
    typer.echo("\n".join([*(f"note: {remark}" for remark in remarks), report.table()]))
    typer.echo(f"figures: {target}; images: {target.parent}/*.png")
