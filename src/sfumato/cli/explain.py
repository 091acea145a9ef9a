"""sfumato explain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from PIL import Image

    from sfumato.data import Dataset
    from sfumato.recipes import Run
    from sfumato.sampling import Progress

COLUMNS, PICTURES = 10, 3
TEXT = """# How {name} makes pictures

1. **Into noise** (`noising.png`). A picture x0 and noise eps are mixed, x = alpha x0 + sigma eps. `schedule.png` shows alpha,
   sigma and the log signal-to-noise ratio over the time t: t = 0 is the picture, t = 1 is noise.
2. **Training** draws a random time for each picture and asks the network for its {target}, which settles both x0 and eps. The loss is
   the mean squared error. The density of log-SNR that training sees is in `density.png`.
3. **Back** (`way_back.png`, by {denoiser}). Each step guesses *all* of the noise, subtracts it (the guess of the clean
   picture is under each noisy one), and adds most of it back. {steps} steps of {sampler}.
"""


def explain(
    source: Annotated[str, typer.Argument(help="A run, a recipe's name, a YAML file or a folder of pictures.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pictures; by default RUN/explained or explained/NAME.")
    ] = None,
) -> None:
    """Draw how diffusion works here: the schedule, a picture on its way into noise, and the way back."""
    from sfumato.observability.pictures import save_png
    from sfumato.recipes import resolve
    from sfumato.recipes.launch import open_data

    settings = resolve(source)
    trained = (Path(source) / "checkpoints").is_dir()
    folder = out or (Path(source) / "explained" if trained else Path("explained") / settings.name)
    dataset = open_data(settings)
    way_back, denoiser = _way_back(source if trained else None, settings, dataset)
    paths = [
        *_curves(settings, folder),
        save_png(_noising(settings, dataset), folder / "noising.png"),
        save_png(way_back, folder / "way_back.png"),
        folder / "README.md",
    ]
    paths[-1].write_text(
        TEXT.format(
            name=settings.name, target=type(settings.denoiser.parameterization).__name__.lower(), denoiser=denoiser,
            steps=settings.sampling.steps, sampler=type(settings.sampling.sampler).__name__,
        )
    )  # fmt: skip
    for path in paths:
        typer.echo(path)


def _curves(settings: Run, folder: Path) -> list[Path]:
    import torch

    from sfumato.observability.pictures import save_png
    from sfumato.observability.plot import Line, line_plot

    t = torch.linspace(0, 1, 201, dtype=torch.float64)
    path, trained = settings.sampling.schedule(t), settings.objective.schedule(t)
    times = t.tolist()
    schedule = [Line("alpha", times, path.alpha.tolist()), Line("sigma", times, path.sigma.tolist())]
    logsnr = trained.logsnr()
    slope = logsnr[:-1] - logsnr[1:]
    inside = (logsnr[1:] > -12) & (logsnr[:-1] < 12)  # uniform t: density of log-SNR = -dt/dlambda
    middle = ((logsnr[1:] + logsnr[:-1]) / 2)[inside]
    density = Line("density", middle.tolist(), (1 / (200 * slope[inside])).tolist())
    ratios = [Line("sampling", times, path.logsnr().tolist()), Line("training", times, logsnr.tolist())]
    plots = {
        "schedule": line_plot("sampling schedule", "time t", schedule),
        "logsnr": line_plot("log signal-to-noise ratio", "time t", ratios),
        "density": line_plot("how often training sees a level", "log-SNR (noise left, data right)", [density]),
    }
    return [save_png(plot, folder / f"{name}.png") for name, plot in plots.items()]


def _noising(settings: Run, dataset: Dataset):
    """A few pictures at ten even times of the sampling schedule."""
    import torch

    from sfumato import randomness
    from sfumato.cli.drawing import dimmed
    from sfumato.data import to_float
    from sfumato.observability.pictures import grid_image
    from sfumato.pipeline import to_unit

    x0 = to_float(dataset.images(dataset.usual(dataset.training)[:PICTURES])[0])
    eps = randomness.normal(settings.seed, "explain", first=0, shape=tuple(x0.shape))
    times = torch.linspace(0, 1, COLUMNS, dtype=torch.float64)
    levels = [settings.sampling.schedule(t) for t in times]
    tiles = torch.stack([to_unit(dimmed(level.mix(x0, eps), level)) for level in levels], dim=1).flatten(0, 1)
    return grid_image(tiles, columns=COLUMNS, labels=[f"t {t:.2f}" for t in times.tolist()])


def _way_back(run: str | None, settings: Run, dataset: Dataset) -> tuple[Image.Image, str]:
    """A few samples' way out of noise: by the trained model, else by the ideal denoiser of the training pictures."""
    import torch

    from sfumato.cli.drawing import trajectory_image
    from sfumato.data import to_float
    from sfumato.diffusion import EmpiricalDenoiser
    from sfumato.recipes import load
    from sfumato.sampling import KeyedNoise, grid, sample

    recorded: list[Progress] = []
    if run is not None:
        pipeline = load(run)
        pipeline.sample(PICTURES, category=list(pipeline.categories) or None, seed=settings.seed, on_step=recorded.append)
        drawn = trajectory_image(
            recorded, pictures=PICTURES, columns=COLUMNS, decode=pipeline.decode, alpha=pipeline.facts.alpha
        )
        return drawn, "the trained model"
    ideal = EmpiricalDenoiser(to_float(dataset.images(dataset.usual(dataset.training)[:2000])[0]))
    noise = KeyedNoise(settings.seed)
    levels = grid(settings.sampling.schedule, settings.sampling.steps)
    x = levels.at(0).sigma * noise(torch.empty(PICTURES, *dataset.image_shape))
    sample(settings.sampling.sampler, ideal, x, levels, noise=noise, on_step=recorded.append)
    return (
        trajectory_image(recorded, pictures=PICTURES, columns=COLUMNS, decode=lambda x: x),
        "the ideal denoiser of the training pictures, which can only reproduce them: a network that generalizes does better",
    )
