"""Quality over time: a diffusion model in pixels, and one in latents whose clock starts before its
autoencoder's training.

    python benchmarks/latent_or_pixel.py [--minutes 30] [--autoencoder 8] [--num 500] [--json FILE]
    [--figure FILE]

Both learn the same images (emoji at 64 x 64 by category), each with a network from the recipes.
Along the way the averaged weights are
sampled alike (the clock stands still), and the samples' Fréchet distance to the training images is
taken in the features of two
networks, with a bootstrap interval: EfficientNet-Lite0, which sees detail, but whose features the
autoencoder's perceptual loss knows;
and a classifier of the categories, trained on half of the training images and compared with the
other half, which knows neither model.
Held-out images, as many as there are, show what real ones get.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import machine, options, report
from torch import Tensor

from sfumato.data import Dataset, to_float
from sfumato.evaluation.classifier import train_classifier
from sfumato.evaluation.distances import frechet_distance, frechet_interval
from sfumato.evaluation.extractors import extractor
from sfumato.networks import UNetConfig
from sfumato.observability.images import grid_image, save_png
from sfumato.recipes import Run, recipe
from sfumato.recipes.autoencoder_stage import PixelsConfig
from sfumato.runs import train
from sfumato.runs.loading import load
from sfumato.runs.preparation import open_data
from sfumato.storage.checkpoint import load_snapshot
from sfumato.storage.run_directory import RunDirectory
from sfumato.training import Budget, PostHocEMAConfig, PreviewConfig, ValidationConfig

STEPS = 20
WIDTH, POINTS = 0.1, 4  # of the averages that are sampled, evenly over each training


def main() -> None:
    """Train both, sample their snapshots, print and draw the curves."""
    asked = options(
        __doc__.splitlines()[0], minutes=30.0, autoencoder=8.0, num=500, seed=0, figure="", place=""
    )
    if asked.quick:
        asked.minutes, asked.autoencoder, asked.num = 0.3, 0.1, 32
    place = Path(asked.place or tempfile.mkdtemp(prefix="latent-or-pixel-"))
    quiet = {
        "validation": ValidationConfig(every_steps=10**9, samples=50),
        "preview": PreviewConfig(every_steps=10**9, num=20),
        "post_hoc_ema": PostHocEMAConfig(widths=(WIDTH,), num=POINTS),
    }
    latent = replace(
        recipe("emoji-latent"),
        seed=asked.seed,
        budget=Budget(minutes=asked.minutes - asked.autoencoder),
        **quiet,
    )
    latent = replace(
        latent,
        autoencoder=replace(
            latent.autoencoder, budget=Budget(minutes=asked.autoencoder), seed=asked.seed
        ),
    )
    network = UNetConfig(channels=32, multipliers=(1, 2, 4, 8), blocks=1, attention_depths=(2, 3))
    emoji = recipe("emoji-text")
    pixel = replace(
        latent,
        name="pixel",
        autoencoder=PixelsConfig(),
        network=network,
        denoiser=emoji.denoiser,
        budget=Budget(minutes=asked.minutes),
    )
    dataset = open_data(pixel)
    judges, held = two_judges(dataset), real(dataset, dataset.with_common_shape(dataset.holdout))
    curves = {
        name: curve(run, place / name, judges, asked.num)
        for name, run in (("latent", latent), ("pixel", pixel))
    }
    result: dict[str, Any] = {
        "machine": machine(),
        "samples": asked.num,
        "references": {judge.name: len(judge.reference) for judge in judges},
        "steps": STEPS,
        "minutes": asked.minutes,
        "autoencoder_minutes": asked.autoencoder,
        "curves": curves,
        "held_out": {"n": len(held)}
        | {judge.name: frechet_distance(judge.read(held), judge.reference) for judge in judges},
    }
    report(result, asked.json)
    if asked.figure:
        draw(result, Path(asked.figure))


def real(dataset: Dataset, positions: Any) -> Tensor:
    """Images of the set in [-1, 1]."""
    return to_float(dataset.images(positions)[0])


class Judge(NamedTuple):
    """Features (n, d) of images in [-1, 1], and those of the images that samples are compared
    with.
    """

    name: str
    read: Callable[[Tensor], Tensor]
    reference: Tensor


def two_judges(dataset: Dataset) -> list[Judge]:
    """EfficientNet-Lite0, or its fallback, with all training images; the classifier with those it
    was not trained on.
    """
    training, features = dataset.with_common_shape(dataset.training), extractor("auto")
    classifier = train_classifier(dataset, training[::2])

    def pooled(images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([features.pooled(part) for part in images.split(64)])

    def read(images: Tensor) -> Tensor:
        return classifier.predict(images)[1]

    return [
        Judge(features.name, pooled, pooled(real(dataset, training))),
        Judge("classifier of the categories", read, read(real(dataset, training[1::2]))),
    ]


def curve(run: Run, place: Path, judges: list[Judge], num: int) -> list[dict[str, Any]]:
    """Minutes since the very beginning, and the samples' distance to the training images, for
    averages kept along the way.
    """
    begun = time.perf_counter()
    train(run, run=place)
    taken = time.perf_counter() - begun
    directory, pipeline = RunDirectory.existing(place), load(place, precision="bfloat16")
    lines = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    times = {line["step"]: line["time"] for line in lines if "time" in line}
    # the autoencoder's training, measuring, encoding; the first two images of both
    before = taken - max(times.values())
    print(f"{run.name}: {before:.0f} s before the diffusion model's first step, {max(times)} steps")
    averages = directory.averages / f"ema-{WIDTH:g}"
    points = []
    for step in sorted(int(path.stem[5:]) for path in averages.glob("step-*.safetensors")):
        pipeline.model.load_state_dict(load_snapshot(averages, step=step))
        images = pipeline.sample(
            num,
            category=list(pipeline.categories),
            seed=1,
            steps=STEPS,
            guidance=1.0,
            batch_size=100,
        )
        seconds = before + times[min(times, key=lambda known: abs(known - step))]
        found = {
            judge.name: frechet_interval(judge.read(images * 2 - 1), judge.reference)
            for judge in judges
        }
        distances = {name: estimate._asdict() for name, estimate in found.items()}
        points.append({"step": step, "minutes": seconds / 60, **distances})
        print(json.dumps(points[-1]))
        save_png(grid_image(images[:60], columns=15), place / f"samples-{step:06d}.png")
    return points


def draw(result: dict[str, Any], path: Path) -> None:
    """The curves over minutes, with their intervals (extra `benchmarks`)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    held = result["held_out"]
    figure, panels = pyplot.subplots(
        1, len(result["references"]), figsize=(11, 4.5), layout="constrained"
    )
    for axes, judge in zip(panels, result["references"], strict=True):
        for name, points in result["curves"].items():
            x = [point["minutes"] for point in points]
            y, low, high = (
                [point[judge][key] for point in points] for key in ("value", "low", "high")
            )
            (line,) = axes.plot(x, y, marker="o", label=name)
            axes.fill_between(x, low, high, alpha=0.2, color=line.get_color())
        axes.axhline(
            held[judge], color="gray", linestyle="--", label=f"held-out real images (n={held['n']})"
        )
        axes.set(
            yscale="log",
            xlabel="minutes on this machine, all stages included",
            xlim=(0, None),
            title=judge,
        )
        axes.grid(which="both", alpha=0.25)
    panels[0].set_ylabel(f"Fréchet distance to the training images, {result['samples']} samples")
    panels[0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
