"""sfumato sample."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from sfumato.pipeline import Pipeline
    from sfumato.sampling import Progress

STRIP_PICTURES, STRIP_STEPS = 4, 10


def sample(
    context: typer.Context,
    run: Annotated[Path | None, typer.Argument(help="Directory of the run; by default the newest in runs/.")] = None,
    num: Annotated[int, typer.Option(min=1, help="How many pictures.")] = 16,
    prompt: Annotated[list[str] | None, typer.Option(help="Text asked for; several are taken in turn.")] = None,
    negative: Annotated[str | None, typer.Option(help="Text to lead away from; needs guidance above 1.")] = None,
    category: Annotated[list[str] | None, typer.Option(help="Category asked for; several are taken in turn.")] = None,
    attribute: Annotated[list[str] | None, typer.Option(help="NAME=NUMBER asked for; may be repeated.")] = None,
    doodle: Annotated[Path | None, typer.Option(help="Line drawing to follow, dark on light.")] = None,
    points: Annotated[Path | None, typer.Option(help="Point cloud to follow: .npy, .ply, .xyz or .csv.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Picture to make variations of.")] = None,
    image: Annotated[Path | None, typer.Option(help="Picture to start from, to complete or to restore.")] = None,
    strength: Annotated[float | None, typer.Option(help="How much of IMAGE is made anew: 0 nothing, 1 everything.")] = None,
    mask: Annotated[Path | None, typer.Option(help="White where IMAGE is painted anew, black where it stays.")] = None,
    to_prompt: Annotated[str | None, typer.Option(help="Show the way from PROMPT to this one.")] = None,
    to_seed: Annotated[int | None, typer.Option(help="Show the way from SEED to this one.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    sampler: Annotated[str | None, typer.Option(help="ddim, ddpm, euler, heun, dpm-solver++2m, unipc, ...")] = None,
    guidance: Annotated[
        list[str] | None, typer.Option(help="Classifier-free guidance scale, 1 is off; or NAME=SCALE for each context.")
    ] = None,
    interval: Annotated[tuple[float, float] | None, typer.Option(help="Log-SNR from where to where guidance acts.")] = None,
    worse: Annotated[int | None, typer.Option(help="Guide away from the snapshot at this step of the run.")] = None,
    worse_scale: Annotated[float, typer.Option(help="How far.")] = 1.5,
    seed: Annotated[int, typer.Option(help="Picture i depends on the seed and i only.")] = 0,
    weights: Annotated[
        str, typer.Option(help="ema: averaged weights; raw: the last step's; or the width of an average to reconstruct.")
    ] = "ema",
    precision: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Inside the network; bfloat16 is faster.")
    ] = "float32",
    compile: Annotated[bool, typer.Option("--compile", help="Compile the network first: pays for many pictures.")] = False,
    trajectory: Annotated[
        bool, typer.Option("--trajectory", help="Also draw the noisy pictures and the guess under each.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; by default RUN/generated/seed-SEED.")] = None,
) -> None:
    """Generate pictures with a trained model; prints the path of the grid."""
    from sfumato.asking import Asked
    from sfumato.recipes import load, newest_run, snapshot

    run = newest_run() if run is None else run
    pipeline = load(run, weights=_weights(weights), precision=precision)
    if compile:
        pipeline.compile()
    scales = _guidance(guidance, pipeline)
    files = {"doodle": doodle, "reference": reference, "image": image, "mask": mask}
    asked = Asked(
        category=category, prompt=prompt, negative=negative, attributes=_numbers(attribute, "--attribute") or None,
        points=_cloud(points), strength=strength,
        **{name: _picture(path, pipeline, gray=name in ("doodle", "mask")) for name, path in files.items()},
    )  # fmt: skip
    recorded: list[Progress] = []
    how: dict[str, Any] = {"steps": steps, "sampler": sampler, "guidance": scales, "interval": interval}
    with _notes():
        if to_prompt is None and to_seed is None:
            bad = None if worse is None else (snapshot(run, worse), worse_scale)
            how |= {"seed": seed, "worse": bad, "on_step": recorded.append if trajectory else None}
            images = pipeline.sample(num, asked=asked, **how)
        else:
            _refuse_on_the_way(worse, trajectory)
            last = asked if to_prompt is None else replace(asked, prompt=to_prompt)
            images = pipeline.between(num, asked, last, seeds=(seed, seed if to_seed is None else to_seed), **how)
    settings = _settings(context.params, run, pipeline) | {"guidance": scales}
    labels = [] if to_prompt else _labels(prompt, category, num)
    _save(images, _strip(recorded, pipeline), out or run / "generated" / f"seed-{seed}", settings, labels)


def _weights(said: str) -> Literal["ema", "raw"] | float:
    if said == "ema":
        return "ema"
    if said == "raw":
        return "raw"
    try:
        return float(said)
    except ValueError:
        raise typer.BadParameter(f"{said!r} is neither ema, raw nor a number", param_hint="--weights") from None


def _settings(options: dict[str, Any], run: Path, pipeline: Pipeline) -> dict[str, Any]:
    """What pictures carry of how they were made: every option that has a say in them; of files no more than the name."""
    said = {name: value for name, value in options.items() if name not in ("out", "trajectory", "compile")}
    for name in ("doodle", "points", "reference", "image", "mask"):
        said[name] = None if said[name] is None else Path(said[name]).name
    steps = options["steps"] or pipeline.sampling.steps
    return said | {"run": run.name, "steps": steps, "sampler": options["sampler"] or type(pipeline.sampling.sampler).__name__}


def _refuse_on_the_way(worse: int | None, trajectory: bool) -> None:
    if worse is not None or trajectory:
        raise typer.BadParameter("not on the way to another prompt or seed", param_hint="--worse, --trajectory")


@contextmanager
def _notes() -> Iterator[None]:
    """Prints which part of a long prompt was read, and which words are unknown, as soon as the images are made."""
    from sfumato.asking import PromptNote

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", PromptNote)
        yield
    for warning in said:
        typer.echo(f"note: {warning.message}", err=True)


def _labels(prompts: list[str] | None, categories: list[str] | None, num: int) -> list[str]:
    """What each picture was asked for, if that differs between them."""
    asked = zip(cycle(prompts or [""]), cycle(categories or [""]), strict=False)
    labels = [", ".join(filter(None, words)) for words in islice(asked, num)]
    return [label if len(label) <= 80 else f"{label[:77]}..." for label in labels] if len(set(labels)) > 1 else []


def _strip(recorded: list[Progress], pipeline: Pipeline) -> Image.Image | None:
    """The way of the first few pictures from noise, if it was recorded."""
    from sfumato.cli.drawing import trajectory_image

    first = recorded[: recorded[0].steps] if recorded else []  # of the first batch
    return trajectory_image(first, pictures=STRIP_PICTURES, columns=STRIP_STEPS, decode=pipeline.decode) if first else None


def _save(images: Tensor, strip: Image.Image | None, folder: Path, settings: dict[str, Any], labels: Sequence[str]) -> None:
    """Every picture, the way of the first few from noise if it was drawn, and the grid with `labels`."""
    from sfumato.observability.pictures import grid_image, picture, save_png

    for number, image in enumerate(images):
        save_png(picture(image), folder / f"{number:05d}.png", {**settings, "index": number})
    if strip is not None:
        typer.echo(save_png(strip, folder / "trajectory.png", settings))
    typer.echo(save_png(grid_image(images, labels=labels), folder / "grid.png", settings))


def _picture(path: Path | None, pipeline: Pipeline, *, gray: bool) -> Any:
    from sfumato.data.given import given_picture

    channels, height, width = pipeline.image_shape
    return None if path is None else given_picture(path, channels=1 if gray else channels, height=height, width=width)


def _cloud(path: Path | None) -> Any:
    from sfumato.data.given import given_points

    return None if path is None else given_points(path)


def _guidance(given: list[str] | None, pipeline: Pipeline) -> float | dict[str, float]:
    """One scale, or one for each context by name."""
    if not given:
        return pipeline.sampling.guidance
    if len(given) == 1 and "=" not in given[0]:
        return _number(given[0], "--guidance")
    return _numbers(given, "--guidance")


def _numbers(given: list[str] | None, option: str) -> dict[str, float]:
    """NAME=NUMBER, repeated."""
    pairs = [text.rpartition("=") for text in given or ()]
    return {name.strip(): _number(value, option) for name, _, value in pairs}


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number", param_hint=option) from None
