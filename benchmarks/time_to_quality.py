"""Quality over time: sfumato beside diffusers' example and denoising-diffusion-pytorch, CIFAR-10 by
category at 32 x 32, equal machines.

    pip install --no-deps denoising-diffusion-pytorch einops
    python benchmarks/time_to_quality.py --data cifar10-train.parquet [--minutes 30] [--seeds 3]
    [--num 5000] --json FILE --place FOLDER

The peers train for --minutes, ours for a quarter of that; each is sampled at every quarter of its
time (500 images) and at its end
(--num images).
Each at its documented settings, in bfloat16, which is the fastest for all: ours as its preset
chooses them, diffusers as
`train_unconditional.py` has them (batch 16, learning rate 1e-4, averaged weights),
denoising-diffusion-pytorch as its README has them
(`classifier_free_guidance.Unet` of 64 channels, batch 32, 8e-5, average 0.995). Images are handed
to the peers from memory; ours reads
its own. All are sampled in 25 deterministic steps without guidance: ours by DPM-Solver++(2M), the
peers by DDIM, as their pipelines do.

Figures: Fréchet and kernel distance to 10,000 training images in the features of EfficientNet-Lite0
(images enlarged to 64 px), with
bootstrap intervals, and the share that a classifier trained on the real images reads as asked; and
how many images were trained on, at
how many model FLOPs each and at what share of the measured convolution peak. The sheet --json is
read first and only what it lacks is run,
so that a long comparison may be made in several sittings. --place keeps images and averaged
weights.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from judge import Judge
from machine import continued, flops, options, peaks, seconds
from peer_unconditional import PeerTrainer, build_peer
from safetensors.torch import save_model
from torch import Tensor, nn

from sfumato import config as configuration
from sfumato.data import AugmentConfig, to_float
from sfumato.evaluation.distances import frechet_interval, kernel_distance_interval
from sfumato.generation.pipeline import Pipeline
from sfumato.observability.images import grid_image, save_png
from sfumato.recipes import Run, resolve
from sfumato.runs import resume, train
from sfumato.runs.loading import load
from sfumato.runs.preparation import open_data
from sfumato.storage.checkpoint import load_snapshot
from sfumato.training import (
    Budget,
    CheckpointConfig,
    PostHocEMAConfig,
    PreviewConfig,
    ValidationConfig,
)

STEPS, CLASSES = 25, 10
PARTS = 4  # of a training, at whose ends it is sampled
ALONG = 500  # images for each point of a curve
PEER_PARAMETERS = 7_000_000
WIDTH = 0.1
Sampled = Callable[[Tensor], Tensor]  # labels (B,) -> images (B, 3, 32, 32) in [0, 1]


class Stage(NamedTuple):
    """A training at one time: minutes and images so far, and the sampler of its weights."""

    minutes: float
    images: int
    sampled: Sampled


Curve = Iterator[Stage]


def recipe(data: str, minutes: float, seed: int) -> Run:
    """What `sfumato train` chooses for such a set on this machine, images mirrored; averages are
    kept along the way.
    """
    never, chosen = 10**9, resolve(data, {"data": {"resolution": 32}})
    return replace(
        chosen,
        name="cifar",
        seed=seed,
        data=replace(chosen.data, augment=AugmentConfig(flip="horizontal")),
        precision="bfloat16",
        budget=Budget(minutes=minutes),
        post_hoc_ema=PostHocEMAConfig(widths=(WIDTH,), num=PARTS),
        checkpoint=CheckpointConfig(every_steps=never, keep=1),
        validation=ValidationConfig(every_steps=never),
        preview=PreviewConfig(every_steps=never, num=20),
        sampling=replace(chosen.sampling, steps=STEPS, guidance=1.0),
    )


def ours(run: Run, place: Path) -> Curve:
    """Train it, or go on with what an earlier sitting began."""
    if not (place / "config.yaml").is_file():
        train(run, run=place)
    elif configuration.plain(resolve(place)) != configuration.plain(run):
        raise SystemExit(f"{place} holds another run: use another --place")
    else:
        resume(place)
    times = {
        line["step"]: line["time"]
        for line in map(json.loads, (place / "metrics.jsonl").open())
        if "time" in line
    }
    pipeline = load(place, precision="bfloat16")
    averages = place / "averages" / f"ema-{WIDTH:g}"
    for path in sorted(averages.glob("step-*.safetensors")):
        step = int(path.stem[5:])
        pipeline.model.load_state_dict(load_snapshot(averages, step=step))
        spent = times[min(times, key=lambda known: abs(known - step))]
        yield Stage(spent / 60, step * run.batch_size, drawn_by(pipeline))


def drawn_by(pipeline: Pipeline) -> Sampled:
    """Other noise at each call."""
    seeds = itertools.count(1)

    def sampled(labels: Tensor) -> Tensor:
        asked = [pipeline.categories[label] for label in labels.tolist()]
        return pipeline.sample(
            len(labels), category=asked, seed=next(seeds), batch_size=len(labels)
        )

    return sampled


def diffusers(images: Tensor, labels: Tensor, minutes: float, place: Path) -> Curve:
    """The example's loop with category embeddings, batch 16."""
    made = partial(PeerTrainer, bf16=True, channels_last=True, ema=True)
    model = build_peer(PEER_PARAMETERS, 32, 64, CLASSES)
    trial = made(copy.deepcopy(model))
    taken = statistics.median(
        seconds(lambda: trial.step(*drawn_batch(images, labels, 16))) for _ in range(20)
    )
    # its learning rate falls to zero at the end, as ours does
    trainer = made(model, steps=round(minutes * 60 / taken))

    def sampler() -> tuple[nn.Module, Sampled]:
        averaged = copy.deepcopy(trainer.model)
        if trainer.ema is not None:
            trainer.ema.copy_to(averaged.parameters())

        def predicted(x: Tensor, time: Tensor, asked: Tensor) -> Tensor:
            return averaged(x, time, asked).sample

        alphas = trainer.scheduler.alphas_cumprod
        return averaged, lambda asked: ddim(predicted, alphas, asked)

    yield from timed(
        lambda: trainer.step(*drawn_batch(images, labels, 16)),
        sampler,
        16,
        minutes,
        place / "diffusers",
    )


def denoising_diffusion_pytorch(
    images: Tensor, labels: Tensor, minutes: float, place: Path
) -> Curve:
    """Its class-conditional network and loss as its README has them; the file is loaded alone,
    since the package wants torchvision.
    """
    peer = peer_module()
    model = peer.Unet(dim=64, dim_mults=(1, 2, 4, 8), num_classes=CLASSES, cond_drop_prob=0.5)
    diffusion = peer.GaussianDiffusion(model, image_size=32, timesteps=1000)
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=8e-5, betas=(0.9, 0.99))
    steps = [0]

    def step() -> None:
        photos, asked = drawn_batch(images, labels, 32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = diffusion((photos + 1) / 2, classes=asked)
        loss.backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps[0] += 1
        # ema_pytorch: every 10 steps, copied for the first 100, then warmed up to 0.995
        if steps[0] % 10 == 0:
            weight = 1.0 if steps[0] <= 100 else max(0.005, (steps[0] - 100) ** (-2 / 3))
            with torch.no_grad():
                for a, b in zip(average.parameters(), model.parameters(), strict=True):
                    a.lerp_(b, weight)

    def sampler() -> tuple[nn.Module, Sampled]:
        kept = copy.deepcopy(average)

        def predicted(x: Tensor, time: Tensor, asked: Tensor) -> Tensor:
            return kept(x, time, asked, cond_drop_prob=0.0)

        return kept, lambda asked: ddim(predicted, diffusion.alphas_cumprod, asked)

    yield from timed(step, sampler, 32, minutes, place / "denoising-diffusion-pytorch")


def peer_module() -> Any:
    """`denoising_diffusion_pytorch.classifier_free_guidance`, without the rest of its package."""
    package = importlib.util.find_spec("denoising_diffusion_pytorch")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("pip install --no-deps denoising-diffusion-pytorch einops")
    path = Path(package.submodule_search_locations[0]) / "classifier_free_guidance.py"
    spec = importlib.util.spec_from_file_location("classifier_free_guidance", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def ddim(
    predicted: Callable[[Tensor, Tensor, Tensor], Tensor], alphas: Tensor, labels: Tensor
) -> Tensor:
    """Deterministic steps of a model that predicts noise, the clean image clipped as both peers'
    samplers clip it.
    """
    x = torch.randn(len(labels), 3, 32, 32)
    times = torch.linspace(-1, len(alphas) - 1, STEPS + 1).int().tolist()[::-1]
    for now, after in pairwise(times):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            noise = predicted(x, torch.full((len(x),), now), labels).float()
        alpha, then = alphas[now], alphas[after] if after >= 0 else torch.ones(())
        clean = ((x - (1 - alpha).sqrt() * noise) / alpha.sqrt()).clamp(-1, 1)
        noise = (x - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        x = then.sqrt() * clean + (1 - then).sqrt() * noise
    return (x + 1) / 2


def drawn_batch(images: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1], half of them mirrored."""
    chosen = torch.randint(len(images), (size,))
    photos = to_float(images[chosen])
    mirrored = torch.rand(size, 1, 1, 1) < 0.5
    return torch.where(mirrored, photos.flip(3), photos), labels[chosen]


def timed(
    step: Callable[[], object],
    sampler: Callable[[], tuple[nn.Module, Sampled]],
    batch: int,
    minutes: float,
    place: Path,
) -> Curve:
    """Train, and stop the clock whenever another part is over; the averaged weights are kept in
    place-PART.safetensors.
    """
    spent, steps = 0.0, 0
    for part in range(1, PARTS + 1):
        begun = time.perf_counter()
        while spent + time.perf_counter() - begun < minutes * 60 * part / PARTS:
            step()
            steps += 1
        spent += time.perf_counter() - begun
        averaged, sampled = sampler()
        save_model(averaged, f"{place}-{part}.safetensors")
        yield Stage(spent / 60, steps * batch, sampled)


def work(stage: Stage, peak: float) -> dict[str, float]:
    """What the training did: an image costs three times its pass forward, which is what a step of
    sampling without guidance is.

    Args:
        peak: GFLOP/s.
    """
    each = 3 * flops(lambda: stage.sampled(torch.arange(CLASSES))) / CLASSES / STEPS / 1e9
    rate = stage.images * each / (stage.minutes * 60)
    return {"images": stage.images, "gflop_per_image": each, "of_convolution_peak": rate / peak}


def figures(judge: Judge, photos: Tensor) -> dict[str, Any]:
    """Of images (N, 3, 32, 32) in [0, 1], as many of each category, in turn."""
    photos = photos * 2 - 1
    features = judge.read(photos)
    return {
        "num": len(photos),
        "frechet": frechet_interval(features, judge.reference)._asdict(),
        "kernel": kernel_distance_interval(features, judge.reference)._asdict(),
        "category_accuracy": judge.category_accuracy(photos),
    }


def drawn(sampled: Sampled, num: int) -> Tensor:
    """`num` images (num, 3, 32, 32) in [0, 1], as many of each category, in turn."""
    labels = torch.arange(num) % CLASSES
    return torch.cat([sampled(part) for part in labels.split(250)]).clamp(0, 1)


def main() -> None:
    """Run what is missing, print it, draw the curves."""
    asked = options(
        __doc__.splitlines()[0],
        data="",
        minutes=30.0,
        seeds=3,
        num=5000,
        place="runs/time-to-quality",
        only="",
        figure="",
    )
    along = ALONG
    if asked.quick:
        asked.minutes, asked.seeds, asked.num, along = 0.4, 1, 50, 50
    place = Path(asked.place)
    place.mkdir(parents=True, exist_ok=True)
    dataset = open_data(resolve(asked.data, {"data": {"resolution": 32}}))
    judge = Judge(dataset, most=10_000)
    images, _, chosen = dataset.images(dataset.training)
    labels = dataset.context(chosen)["category"]
    contestants: dict[str, Callable[[], Curve]] = {
        **{
            f"sfumato, seed {seed}": lambda seed=seed: ours(
                recipe(asked.data, asked.minutes / 4, seed), place / f"seed-{seed}"
            )
            for seed in range(asked.seeds)
        },
        "diffusers": lambda: diffusers(images, labels, asked.minutes, place),
        "denoising-diffusion-pytorch": lambda: denoising_diffusion_pytorch(
            images, labels, asked.minutes, place
        ),
    }
    own = recipe(asked.data, asked.minutes / 4, 0)
    settings = {
        "extractor": judge.features.name,
        "steps": STEPS,
        "minutes": asked.minutes,
        "num": asked.num,
        "ours": str((own.network, own.optimizer, own.objective)),
    }
    sheet = continued(asked.json, settings, rows="curves")
    peak = peaks()
    sheet |= {
        "peak": peak,
        "reference": len(judge.reference),
        "classifier_accuracy": judge.classifier.held_out_accuracy,
    }
    for name, curve in contestants.items():
        if name in sheet["curves"] or (asked.only and asked.only not in name):
            continue
        torch.manual_seed(0)
        points = []
        for number, stage in enumerate(curve(), 1):
            photos = drawn(stage.sampled, along)
            save_png(
                grid_image(photos[:100], columns=CLASSES),
                place / f"{name.replace(', ', '-')}-{number}.png",
            )
            points.append({"minutes": stage.minutes, **figures(judge, photos)})
            print(name, json.dumps(points[-1]), flush=True)
        end = figures(
            judge,
            torch.cat([photos, drawn(stage.sampled, asked.num - along)])
            if asked.num > along
            else photos,
        )
        end |= work(stage, peak["convolution_gflops"])
        print(name, json.dumps(end), flush=True)
        sheet["curves"][name] = {"points": points, "end": end}
        if asked.json:
            asked.json.write_text(json.dumps(sheet, indent=1))
    if asked.figure:
        draw(sheet, Path(asked.figure))


def draw(sheet: dict[str, Any], path: Path) -> None:
    """Both distances over minutes (extra `benchmarks`)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axes, key, title in zip(
        panels, ("frechet", "kernel"), ("Fréchet distance", "kernel distance"), strict=True
    ):
        peers = [name for name in sheet["curves"] if not name.startswith("sfumato")]
        for name, curve in sheet["curves"].items():
            points = curve["points"]
            x = [point["minutes"] for point in points]
            y, low, high = (
                [point[key][part] for point in points] for part in ("value", "low", "high")
            )
            colour = "C0" if name not in peers else f"C{1 + peers.index(name)}"  # all seeds alike
            axes.plot(x, y, marker="o", label=name, color=colour)
            axes.fill_between(x, low, high, alpha=0.2, color=colour, linewidth=0)
        axes.set(
            xlabel="minutes of training",
            xlim=(0, None),
            ylim=(0, None),
            title=f"{title}, {sheet['settings']['extractor']}",
        )
        axes.grid(alpha=0.25)
    panels[0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
