"""The command `sfumato compare`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sfumato.generation.pipeline import Pipeline
    from sfumato.sampling import StepInfo

USUAL = ("ddim:100", "ddim:20", "heun:10", "dpm-solver++2m:20")
USUAL_NUM = 8


@dataclass(frozen=True)
class Setup:
    """How one row is sampled: a sampler's name, denoising steps, guidance scale."""

    sampler: str
    steps: int
    guidance: float

    def __str__(self) -> str:
        return f"{self.sampler}, {self.steps} steps, guidance {self.guidance:g}"


@dataclass(frozen=True)
class ComparisonRow:
    """The result of one setup.

    Attributes:
        images: (N, C, H, W) in [0, 1].
        calls: network evaluations for each image; guidance doubles them.
        seconds: for all images of the row.
    """

    setup: Setup
    images: Tensor
    calls: float
    seconds: float

    def plain(self, reference: ComparisonRow) -> dict[str, Any]:
        """Return the figures of the row as plain data, for JSON.

        `difference` is the mean absolute difference of values in [0, 1] to the reference.
        """
        difference = float((self.images - reference.images).abs().mean())
        return {
            **vars(self.setup),
            "calls": self.calls,
            "seconds": self.seconds,
            "difference": difference,
        }


def compare(
    run: Annotated[Path, typer.Argument(help="Directory of the run.")],
    sampler: Annotated[
        list[str] | None,
        typer.Option(help=f"NAME or NAME:STEPS; repeat to compare. By default {' '.join(USUAL)}."),
    ] = None,
    guidance: Annotated[
        list[float] | None,
        typer.Option(help="Guidance scale; repeat to compare. By default the run's."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of samplers named without :STEPS. By default the run's."),
    ] = None,
    num: Annotated[
        int | None,
        typer.Option(
            min=1, max=64, help="Images in each row. By default 8, or one for each prompt."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise, the same in each row.")] = 0,
    category: Annotated[
        list[str] | None, typer.Option(help="Category; repeat to cycle through several.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text prompt; repeat to cycle through several.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="PNG to write. By default RUN/compared/seed-SEED.png.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Draw the same noise denoised by several samplers and guidance scales, one row for each, and
    print what each row costs.
    """
    from sfumato.observability.images import save_png
    from sfumato.runs import load

    named = [_named(text) for text in sampler or USUAL]
    pipeline = load(run)
    own = pipeline.sampling
    scales = list(dict.fromkeys(guidance or [own.guidance]))
    chosen = dict.fromkeys((name, given or steps or own.steps) for name, given in named)
    setups = [Setup(name, count, scale) for (name, count), scale in product(chosen, scales)]
    wanted = _wanted(pipeline, category, prompt, scales)
    num = _num(num, len(wanted["category"] or ()) if category else 0, len(wanted["prompt"] or ()))
    settings = {
        "run": run.name,
        "seed": seed,
        "num": num,
        **wanted,
        "rows": [vars(setup) for setup in setups],
    }
    target = _target(run, seed, out, settings)
    rows = _sampled(pipeline, setups, num, seed, wanted)
    figures = [row.plain(rows[0]) for row in rows]
    save_png(_figure(rows, wanted, num), target, settings)
    if as_json:
        typer.echo(
            json.dumps({"figure": str(target), "seed": seed, "num": num, "rows": figures}, indent=1)
        )
        return
    typer.echo(table(figures))
    typer.echo(target)


def _named(text: str) -> tuple[str, int | None]:
    """Parse `ddim:20` into a known name and its steps."""
    from sfumato.sampling.registry import find_sampler

    name, colon, count = text.partition(":")
    if colon and not (count.isdecimal() and int(count) > 0):
        raise typer.BadParameter(
            f"{text!r}: the number of steps after the colon must be 1 or more",
            param_hint="--sampler",
        )
    find_sampler(name)
    return name, int(count) if colon else None


def _wanted(
    pipeline: Pipeline,
    category: list[str] | None,
    prompt: list[str] | None,
    scales: Sequence[float],
) -> dict[str, list[str] | None]:
    """Return what the images are steered by: all categories in turn if nothing is named.

    Raises:
        ConfigError: for guidance of a model, or of a request, that nothing steers.
    """
    from sfumato.errors import ConfigError

    if category is None and prompt is None:
        category = list(pipeline.categories) or None
    if category is None and prompt is None and any(scale != 1 for scale in scales):
        readers = ", ".join(pipeline.reads)
        raise ConfigError(
            "guidance has no effect without a condition",
            where="compare",
            hint=f"give a --prompt (the model reads {readers})"
            if readers
            else "leave out --guidance: the model reads no condition",
        )
    return {"category": category, "prompt": prompt}


def _num(num: int | None, *named: int) -> int:
    """Return the number of images in a row, enough for everything that is named."""
    if num is not None and num < max(named):
        raise typer.BadParameter(
            f"{max(named)} prompts or categories do not fit into rows of {num}", param_hint="--num"
        )
    return num or max(USUAL_NUM, *named)


def _target(run: Path, seed: int, out: Path | None, settings: dict[str, Any]) -> Path:
    """Choose where to write the figure, never over a file that shows something else.

    Raises:
        ConfigError: if `out` exists and was not made by the same comparison.
    """
    from sfumato.errors import ConfigError

    if out is not None:
        if out.exists() and _carried(out) != settings:
            raise ConfigError(
                "another file exists there",
                where=str(out),
                hint="choose another --out, or move that file",
            )
        return out
    place, number = run / "compared" / f"seed-{seed}.png", 1
    while place.exists() and _carried(place) != settings:
        number += 1
        place = run / "compared" / f"seed-{seed}-{number}.png"
    return place


def _carried(path: Path) -> Any:
    """Read the settings that a PNG of sfumato carries; return None for any other file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return json.loads(image.info["sfumato"])
    except (OSError, KeyError, ValueError):
        return None


def _sampled(
    pipeline: Pipeline, setups: Sequence[Setup], num: int, seed: int, wanted: dict[str, Any]
) -> list[ComparisonRow]:
    from sfumato.observability.progress import ProgressBar

    def sample(
        setup: Setup, images: int, count: int, on_step: Callable[[StepInfo], None] | None = None
    ) -> Tensor:
        return pipeline.sample(
            images,
            seed=seed,
            steps=count,
            sampler=setup.sampler,
            guidance=setup.guidance,
            on_step=on_step,
            **wanted,
        )

    # an impossible row fails before the others take their time, and the first call warms up
    for setup in setups:
        sample(setup, 1, min(2, setup.steps))
    rows: list[ComparisonRow] = []
    total, done = sum(setup.steps for setup in setups), 0
    with ProgressBar("comparing") as bar:
        for setup in setups:
            tell = lambda step: bar.update((done + step.step) / total, str(setup))  # noqa: B023, E731
            with _counted(pipeline.model.network) as evaluated:
                begun = time.perf_counter()
                images = sample(setup, num, setup.steps, tell)
                seconds = time.perf_counter() - begun
            rows.append(ComparisonRow(setup, images, sum(evaluated) / num, seconds))
            done += setup.steps
    return rows


@contextmanager
def _counted(network: nn.Module) -> Iterator[list[int]]:
    """Yield a list that receives the number of images of each call of the network."""
    seen: list[int] = []
    handle = network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    try:
        yield seen
    finally:
        handle.remove()


def _figure(rows: Sequence[ComparisonRow], wanted: dict[str, Any], num: int) -> Any:
    import torch

    from sfumato.observability.images import grid_image

    labels = [f"{row.setup}: {row.calls:g} calls, {row.seconds:.3g} s" for row in rows]
    named = wanted["prompt"] or wanted["category"] or []
    columns = (
        [text if len(text) <= 40 else f"{text[:37]}..." for text in islice(cycle(named), num)]
        if named
        else []
    )
    return grid_image(
        torch.cat([row.images for row in rows]), columns=num, row_labels=labels, labels=columns
    )


def table(figures: Sequence[dict[str, Any]]) -> str:
    """Format the rows as a table; differences are to the first one."""
    from sfumato.observability.tables import format_table

    head = (
        "sampler",
        "steps",
        "guidance",
        "network calls per image",
        "seconds",
        "mean difference to the first row (of 1)",
    )
    lines = [
        (
            row["sampler"],
            str(row["steps"]),
            f"{row['guidance']:g}",
            f"{row['calls']:g}",
            f"{row['seconds']:.3g}",
            f"{row['difference']:.4f}" if number else "reference",
        )
        for number, row in enumerate(figures)
    ]
    return format_table([head, *lines])
