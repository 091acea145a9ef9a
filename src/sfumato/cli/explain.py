"""The command `sfumato explain`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from sfumato.data import Dataset
    from sfumato.generation.pipeline import Pipeline
    from sfumato.recipes import Run
    from sfumato.sampling import StepInfo

COLUMNS, IMAGES = 10, 3
SCALES, GUIDED_STEPS = (1.0, 1.5, 2.0, 3.0, 5.0), 50
LOOKED_AT, FLAT = (
    100,
    0.1,
)  # images among which those to draw are found; contrast, in that of the strongest, below which one looks blank
TEXT = """# How {name} makes images

1. **Into noise** (`noising.png`). An image x0 and noise eps are mixed, x = alpha x0 + sigma eps. `schedule.png` shows alpha,
   sigma and the log signal-to-noise ratio over the time t: t = 0 is the image, t = 1 is noise.
2. **Training** draws a random time for each image and asks the network for its {target}, which settles both x0 and eps. The loss is
   the mean squared error. The density of log-SNR that training sees is in `density.png`.
3. **Back** (`way_back.png`, by {denoiser}). Each step guesses *all* of the noise, subtracts it (the guess of the clean
   image is under each noisy one), and adds most of it back. {steps} steps of {sampler}.

All images share one scale: -1 is black and 1 is white. Only where a schedule amplifies x (alpha^2 + sigma^2 > 1) is the noisy
image divided by sqrt(alpha^2 + sigma^2).
"""
GUIDED = """
4. **Guidance** (`guidance.png`): the same noise and the same conditions at guidance {scales}, {steps} steps. Guidance follows
   the condition more closely and gives up variety; too much of it saturates.
"""


def explain(
    source: Annotated[
        str, typer.Argument(help="A run, a recipe's name, a YAML file or a folder of images.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the images; by default RUN/explained or explained/NAME."),
    ] = None,
) -> None:
    """Draw how diffusion works here: the schedule, an image on its way into noise, the way back,
    and what guidance does.
    """
    from sfumato.config import kind_of
    from sfumato.observability.images import save_png
    from sfumato.recipes import resolve
    from sfumato.runs import load
    from sfumato.runs.preparation import open_data
    from sfumato.storage.output_paths import require_writable

    settings = resolve(source)
    trained = (Path(source) / "checkpoints").is_dir()
    folder = out or (Path(source) / "explained" if trained else Path("explained") / settings.name)
    require_writable(folder)
    dataset = open_data(settings, directory=source)
    pipeline = load(source) if trained else None
    way_back, denoiser = _way_back(pipeline, settings, dataset)
    paths = [
        *_curves(settings, folder),
        save_png(_noising(settings, dataset), folder / "noising.png"),
        save_png(way_back, folder / "way_back.png"),
    ]
    strip = _guidance_strip(pipeline, dataset, settings.seed) if pipeline is not None else None
    if strip is not None:
        paths.append(save_png(strip, folder / "guidance.png"))
    guided = GUIDED.format(
        scales=", ".join(f"{scale:g}" for scale in SCALES),
        steps=min(GUIDED_STEPS, settings.sampling.steps),
    )
    readme = folder / "README.md"
    readme.write_text(
        TEXT.format(
            name=settings.name,
            target=kind_of(type(settings.denoiser.parameterization)),
            denoiser=denoiser,
            steps=settings.sampling.steps,
            sampler=kind_of(type(settings.sampling.sampler)),
        )
        + (guided if strip is not None else "")
    )
    for path in [*paths, readme]:
        typer.echo(path)


def _curves(settings: Run, folder: Path) -> list[Path]:
    import torch

    from sfumato.observability.images import save_png
    from sfumato.observability.plot import Line, line_plot

    t = torch.linspace(0, 1, 201, dtype=torch.float64)
    path, trained = settings.sampling.schedule(t), settings.objective.schedule(t)
    times = t.tolist()
    schedule = [
        Line("alpha", times, path.alpha.tolist()),
        Line("sigma", times, path.sigma.tolist()),
    ]
    logsnr = trained.logsnr()
    slope = logsnr[:-1] - logsnr[1:]
    inside = (logsnr[1:] > -12) & (logsnr[:-1] < 12)  # uniform t: density of log-SNR = -dt/dlambda
    middle = ((logsnr[1:] + logsnr[:-1]) / 2)[inside]
    density = Line("density", middle.tolist(), (1 / (200 * slope[inside])).tolist())
    ratios = [
        Line("sampling", times, path.logsnr().tolist()),
        Line("training", times, logsnr.tolist()),
    ]
    plots = {
        "schedule": line_plot("sampling schedule", "time t", schedule),
        "logsnr": line_plot("log signal-to-noise ratio", "time t", ratios),
        "density": line_plot(
            "how often training sees a level", "log-SNR (noise left, data right)", [density]
        ),
    }
    return [save_png(plot, folder / f"{name}.png") for name, plot in plots.items()]


def _noising(settings: Run, dataset: Dataset) -> Image.Image:
    """Draw a few images at ten evenly spaced times of the sampling schedule."""
    import torch

    from sfumato import randomness
    from sfumato.cli.trajectory_images import dimmed
    from sfumato.data import to_float
    from sfumato.generation.pipeline import to_unit
    from sfumato.observability.images import grid_image

    x0 = _with_contrast(
        to_float(dataset.images(dataset.with_common_shape(dataset.training)[:LOOKED_AT])[0])
    )
    eps = randomness.normal(settings.seed, "explain", first=0, shape=tuple(x0.shape))
    times = torch.linspace(0, 1, COLUMNS, dtype=torch.float64)
    levels = [settings.sampling.schedule(t) for t in times]
    tiles = torch.stack(
        [to_unit(dimmed(level.mix(x0, eps), level)) for level in levels], dim=1
    ).flatten(0, 1)
    return grid_image(tiles, columns=COLUMNS, labels=[f"t {t:.2f}" for t in times.tolist()])


def _with_contrast(images: Tensor) -> Tensor:
    """Return the first images that are not blank, or those of most contrast if they are too few."""
    contrast = images.flatten(1).std(1)
    chosen = (contrast >= FLAT * contrast.max()).nonzero().flatten()
    if len(chosen) < IMAGES:
        chosen = contrast.argsort(descending=True, stable=True)
    return images[chosen[:IMAGES]]


def _guidance_strip(pipeline: Pipeline, dataset: Dataset, seed: int) -> Image.Image | None:
    """Draw the same noise at rising guidance, by categories or else by captions.

    The result is None for a model that neither categories nor text steer.
    """
    import torch

    from sfumato.contexts import Text, part_of
    from sfumato.observability.images import grid_image

    categories = list(pipeline.categories[:COLUMNS]) or None
    captions = dataset.captions(dataset.with_common_shape(dataset.training))
    texts = (
        list(dict.fromkeys(found[0] for found in captions if found))[:COLUMNS]
        if part_of(pipeline.model.conditioner, Text) is not None
        else []
    )
    if categories is None and not texts:
        return None
    prompt = None if categories else texts
    num, steps = len(categories or texts), min(GUIDED_STEPS, pipeline.sampling.steps)
    rows = [
        pipeline.sample(
            num, seed=seed, guidance=scale, steps=steps, category=categories, prompt=prompt
        )
        for scale in SCALES
    ]
    labels = [text if len(text) <= 40 else f"{text[:37]}..." for text in categories or texts]
    return grid_image(
        torch.cat(rows),
        columns=num,
        labels=labels,
        row_labels=[f"guidance {scale:g}" for scale in SCALES],
    )


def _way_back(
    pipeline: Pipeline | None, settings: Run, dataset: Dataset
) -> tuple[Image.Image, str]:
    """Draw how a few samples emerge from noise, and name the denoiser.

    It is the trained model, or else the ideal denoiser of the training images.
    """
    import torch

    from sfumato.cli.trajectory_images import trajectory_image
    from sfumato.data import to_float
    from sfumato.diffusion import EmpiricalDenoiser
    from sfumato.sampling import KeyedNoise, grid, sample

    recorded: list[StepInfo] = []
    if pipeline is not None:
        pipeline.sample(
            IMAGES,
            category=list(pipeline.categories) or None,
            seed=settings.seed,
            on_step=recorded.append,
        )
        drawn = trajectory_image(
            recorded,
            images=IMAGES,
            columns=COLUMNS,
            decode=pipeline.decode,
            alpha=pipeline.info.alpha,
        )
        return drawn, "the trained model"
    ideal = EmpiricalDenoiser(
        to_float(dataset.images(dataset.with_common_shape(dataset.training)[:2000])[0])
    )
    noise = KeyedNoise(settings.seed)
    sampling = settings.sampling
    levels = grid(sampling.schedule, sampling.steps, spacing=sampling.spacing)
    x = levels.at(0).sigma * noise(torch.empty(IMAGES, *dataset.image_shape))
    sample(settings.sampling.sampler, ideal, x, levels, noise=noise, on_step=recorded.append)
    return (
        trajectory_image(recorded, images=IMAGES, columns=COLUMNS, decode=lambda x: x),
        "the ideal denoiser of the training images, which can only reproduce them: a network "
        "that generalizes does better",
    )
