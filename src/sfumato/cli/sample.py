"""sfumato sample."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from sfumato.sampling import Progress

STRIP_PICTURES, STRIP_STEPS = 4, 10


def sample(
    run: Annotated[Path, typer.Argument(help="Directory of the run.")],
    num: Annotated[int, typer.Option(min=1, help="How many pictures.")] = 16,
    category: Annotated[list[str] | None, typer.Option(help="Category asked for; several are taken in turn.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    sampler: Annotated[str | None, typer.Option(help="ddim, ddpm, euler, heun, dpm-solver++2m, unipc, ...")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale; 1 is off.")] = None,
    seed: Annotated[int, typer.Option(help="Picture i depends on the seed and i only.")] = 0,
    weights: Annotated[Literal["ema", "raw"], typer.Option(help="Averaged weights, or the last step's.")] = "ema",
    precision: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Inside the network; bfloat16 is faster.")
    ] = "float32",
    trajectory: Annotated[
        bool, typer.Option("--trajectory", help="Also draw the noisy pictures and the guess under each.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; by default RUN/generated/seed-SEED.")] = None,
) -> None:
    """Generate pictures with a trained model; prints the path of the grid."""
    from sfumato.cli.drawing import trajectory_image
    from sfumato.observability.pictures import grid_image, picture, save_png
    from sfumato.recipes import load

    pipeline = load(run, weights=weights, precision=precision)
    recorded: list[Progress] = []
    images = pipeline.sample(
        num,
        category=category,
        seed=seed,
        steps=steps,
        sampler=sampler,
        guidance=guidance,
        on_step=recorded.append if trajectory else None,
    )
    folder = out or run / "generated" / f"seed-{seed}"
    settings = {
        "run": run.name, "seed": seed, "category": category, "steps": steps or pipeline.sampling.steps,
        "sampler": sampler or type(pipeline.sampling.sampler).__name__, "weights": weights, "precision": precision,
        "guidance": pipeline.sampling.guidance if guidance is None else guidance,
    }  # fmt: skip
    for number, image in enumerate(images):
        save_png(picture(image), folder / f"{number:05d}.png", {**settings, "index": number})
    if trajectory:
        strip = trajectory_image(recorded[: recorded[0].steps], pictures=STRIP_PICTURES, columns=STRIP_STEPS)
        typer.echo(save_png(strip, folder / "trajectory.png", settings))
    typer.echo(save_png(grid_image(images), folder / "grid.png", settings))
