"""What each part of the recipe buys: equal minutes on CIFAR-10, the same seeds for all, each
against the base it changes.

    python benchmarks/ablations.py --data cifar10-train.parquet [--minutes 2] [--seeds 3] [--side
    16] [--only "NAME;NAME"] [--json FILE]

Each run is trained for the same minutes, and 1,000 samples (20 steps) without guidance and as many
with it are compared with the training
images: kernel and Fréchet distance in the features of EfficientNet-Lite0 (images enlarged to 64
px), and the share that a classifier
trained on the real images reads as asked, since a part may make better images of the wrong thing;
the standard deviation of their
values, which distances forgive; and its error on held-out images at fixed noises, which compares
whatever the network predicts. The
sheet --json is read first, and only what it lacks is run, so that a long table may be made in
several sittings.
Differences are taken seed by seed; the interval is Student's t.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from judge import Judge
from machine import continued, options
from scipy.stats import t as student

from sfumato.autoencoders import Pixels
from sfumato.conditioners import CategoryConfig
from sfumato.contexts import ContextConfig
from sfumato.data import AugmentConfig
from sfumato.diffusion import (
    EDM,
    Flow,
    IndependentTimes,
    Linear,
    LogitNormal,
    LogNormal,
    MinibatchOptimalTransport,
    MinSNR,
    Native,
    Objective,
    Sample,
    Shift,
    SigmoidWeighting,
    TargetSpace,
    UnitVariance,
    Velocity,
    Warped,
)
from sfumato.evaluation.distances import frechet_distance, kernel_distance
from sfumato.generation.diffusion_model import DenoiserConfig, SamplingConfig
from sfumato.generation.pipeline import Pipeline
from sfumato.networks import DiTConfig, UNetConfig
from sfumato.recipes import Run, resolve
from sfumato.runs import train
from sfumato.runs.loading import load
from sfumato.runs.preparation import build_model, conditioning_info, open_data
from sfumato.training import (
    AlignmentConfig,
    AuxiliaryConfig,
    Budget,
    CheckpointConfig,
    DispersiveConfig,
    MuonConfig,
    OptimizerConfig,
    PowerEMA,
    PreviewConfig,
    ValidationConfig,
)
from sfumato.training.monitors import Validator
from sfumato.training.precision import default_device

STEPS = 20
GUIDANCE = 1.5
ADAMW = OptimizerConfig(learning_rate=1e-3, warmup_steps=50)
MUON = OptimizerConfig(learning_rate=4e-3, warmup_steps=50, muon=MuonConfig())
Change = Callable[[Run], Run]


def with_objective(**changes: Any) -> Change:
    """The objective with some fields changed."""
    return lambda run: replace(run, objective=replace(run.objective, **changes))


def with_network(**changes: Any) -> Change:
    """The network with some fields changed."""
    return lambda run: replace(run, network=replace(run.network, **changes))


def with_auxiliary(**changes: Any) -> Change:
    """Something trained beside the model."""
    return lambda run: replace(run, auxiliary=AuxiliaryConfig(**changes))


def predicting(parameterization: Any, weighting: Any) -> Change:
    """Another target, and how its errors count."""
    return lambda run: replace(
        run,
        denoiser=replace(run.denoiser, parameterization=parameterization),
        objective=replace(run.objective, weighting=weighting),
    )


def shifted(factor: float) -> Change:
    """More noise in training and in sampling, or less."""
    warp = Shift(factor)
    return lambda run: replace(
        run,
        objective=replace(
            run.objective,
            schedule=Warped(schedule=Warped(schedule=Linear(), warp=warp), warp=LogitNormal()),
        ),
        sampling=replace(run.sampling, schedule=Warped(schedule=Linear(), warp=warp)),
    )


def stepped_by(optimizer: OptimizerConfig, rate: float) -> Change:
    """Another optimizer, or another rate."""
    return lambda run: replace(run, optimizer=replace(optimizer, learning_rate=rate))


def transformer_with(change: Change) -> tuple[str, Change]:
    """A row that changes the transformer."""
    return "transformer", lambda run: change(TRANSFORMER(run))


def unchanged(run: Run) -> Run:
    """The base itself."""
    return run


def with_transformer(run: Run) -> Run:
    """A small transformer in place of the U-Net."""
    return replace(run, network=DiTConfig(patch_size=2, hidden_size=192, depth=4))


TRANSFORMER: Change = with_transformer
WIDER: Change = with_network(channels=64, multipliers=(1, 2, 2))
# name -> what it is compared with, and what it changes there
CHANGES: dict[str, tuple[str, Change]] = {
    "u-net": ("", unchanged),
    "channels 64-128-128 instead of 32-64-128": ("u-net", WIDER),
    "one block a depth": ("u-net", with_network(blocks=1)),
    "AdamW instead of Muon": ("u-net", lambda run: replace(run, optimizer=ADAMW)),
    "AdamW, channels 64-128-128": (
        "AdamW instead of Muon",
        lambda run: WIDER(replace(run, optimizer=ADAMW)),
    ),
    "the same, rates scaled from 32 channels": (
        "AdamW, channels 64-128-128",
        lambda run: WIDER(replace(run, optimizer=replace(ADAMW, base_width=32))),
    ),
    "batch 32": ("u-net", lambda run: replace(run, batch_size=32)),
    "uniform times": ("u-net", with_objective(schedule=Linear())),
    "times drawn one by one": ("u-net", with_objective(times=IndependentTimes())),
    "velocity, log-normal levels": (
        "u-net",
        lambda run: replace(
            run,
            denoiser=DenoiserConfig(parameterization=Velocity(0.5)),
            objective=Objective(schedule=LogNormal(), weighting=Native()),
        ),
    ),
    "EDM weighting": ("u-net", with_objective(weighting=EDM())),
    "min-SNR weighting": ("u-net", with_objective(weighting=MinSNR())),
    "sigmoid weighting": ("u-net", with_objective(weighting=SigmoidWeighting())),
    "learned uncertainty": ("u-net", with_auxiliary(uncertainty=True)),
    "dispersive loss": ("u-net", with_auxiliary(dispersive=DispersiveConfig())),
    "alignment to EfficientNet-Lite0": ("u-net", with_auxiliary(alignment=AlignmentConfig())),
    "contrastive flow matching": ("u-net", with_objective(contrast=0.05)),
    "one block, contrastive flow matching": (
        "one block a depth",
        lambda run: with_objective(contrast=0.05)(with_network(blocks=1)(run)),
    ),
    "optimal-transport coupling": ("u-net", with_objective(coupling=MinibatchOptimalTransport())),
    "shift 2": ("u-net", shifted(2.0)),
    "shift 1/2": ("u-net", shifted(0.5)),
    "shift 1/4": ("u-net", shifted(0.25)),
    "one block, shift 1/2": ("u-net", lambda run: shifted(0.5)(with_network(blocks=1)(run))),
    "EMA 0.05": ("u-net", lambda run: replace(run, ema=PowerEMA(0.05))),
    "EMA 0.2": ("u-net", lambda run: replace(run, ema=PowerEMA(0.2))),
    "dropout 0.1": ("u-net", with_network(dropout=0.1)),
    "transformer": ("u-net", TRANSFORMER),
    "transformer, AdamW": transformer_with(stepped_by(ADAMW, 1e-3)),
    "transformer, AdamW at 2e-3": transformer_with(stepped_by(ADAMW, 2e-3)),
    "transformer, Muon at 2e-3": transformer_with(stepped_by(MUON, 2e-3)),
    "transformer, Muon at 8e-3": transformer_with(stepped_by(MUON, 8e-3)),
    "transformer, Muon at 16e-3": transformer_with(stepped_by(MUON, 16e-3)),
    "transformer, registers": transformer_with(with_network(registers=4)),
    "transformer, context as tokens": transformer_with(with_network(vector_conditioning="tokens")),
    "transformer, alignment": transformer_with(with_auxiliary(alignment=AlignmentConfig())),
    "transformer, dispersive loss": transformer_with(with_auxiliary(dispersive=DispersiveConfig())),
    "patches of 4": transformer_with(with_network(patch=4)),
    "patches of 4, image predicted, velocity loss": (
        "patches of 4",
        lambda run: predicting(Sample(), TargetSpace(space=Flow()))(
            with_network(patch=4)(TRANSFORMER(run))
        ),
    ),
    "patches of 4, the same through a bottleneck": (
        "patches of 4, image predicted, velocity loss",
        lambda run: predicting(Sample(), TargetSpace(space=Flow()))(
            with_network(patch=4, bottleneck=32)(TRANSFORMER(run))
        ),
    ),
}


def base(data: str, side: int, minutes: float) -> Run:
    """A small U-Net steered by category."""
    chosen = resolve(data, {"data": {"resolution": side}})
    never = 10**9
    return Run(
        name="ablation",
        data=replace(chosen.data, augment=AugmentConfig(flip="horizontal")),
        network=UNetConfig(
            channels=32, multipliers=(1, 2, 4), attention_depths=(2,), head_channels=64
        ),
        conditioner=ContextConfig(category=CategoryConfig()),
        denoiser=DenoiserConfig(input_scale=UnitVariance(0.5)),
        optimizer=MUON,
        batch_size=64,
        precision="bfloat16",
        budget=Budget(minutes=minutes),
        checkpoint=CheckpointConfig(every_steps=never, keep=1),
        validation=ValidationConfig(every_steps=never, samples=1000),
        preview=PreviewConfig(every_steps=never, num=10),
        sampling=SamplingConfig(steps=STEPS),
    )


def figures(pipeline: Pipeline, judge: Judge, num: int, guidance: float) -> dict[str, float]:
    """Of `num` samples, the categories in turn."""
    images = (
        pipeline.sample(
            num, category=list(pipeline.categories), seed=1, guidance=guidance, batch_size=100
        )
        * 2
        - 1
    )
    features = judge.read(images)
    return {
        "kernel": kernel_distance(features, judge.reference),
        "frechet": frechet_distance(features, judge.reference),
        "asked": 100 * judge.category_accuracy(images),
        "deviation": float(images.std()) / 2,
    }


def measured(run: Run, judge: Judge, validator: Validator, num: int) -> dict[str, float]:
    """Train, sample, compare."""
    with tempfile.TemporaryDirectory() as folder:
        place = train(run, run=Path(folder) / "run")
        lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        pipeline = load(place, precision="bfloat16")
    guided = figures(pipeline, judge, num, GUIDANCE)
    return {
        **figures(pipeline, judge, num, 1.0),
        **{f"guided_{name}": value for name, value in guided.items()},
        "noise_mse": validator.error(pipeline.model)["eps_mse"],
        "steps": max(line["step"] for line in lines),
    }


def main() -> None:
    """Run what is missing, and print the table."""
    asked = options(
        __doc__.splitlines()[0], data="", minutes=2.0, seeds=3, side=16, num=1000, only=""
    )
    if asked.quick:
        asked.minutes, asked.seeds, asked.num = 0.03, 2, 20
    start = base(asked.data, asked.side, asked.minutes)
    dataset = open_data(start)
    judge = Judge(dataset, most=5000)
    # The same images, noises and levels for all, whatever schedule they were trained on.
    conditioner = build_model(start, conditioning_info(start, dataset)).conditioner
    validator = Validator(
        config=start,
        dataset=dataset,
        schedule=start.objective.schedule,
        conditioner=conditioner,
        autoencoder=Pixels(3),
        device=default_device(),
    )
    settings = {
        "extractor": judge.features.name,
        "minutes": asked.minutes,
        "side": asked.side,
        "num": asked.num,
        "guidance": GUIDANCE,
    }
    sheet = continued(asked.json, settings, rows="runs") | {
        "classifier_accuracy": judge.classifier.held_out_accuracy
    }
    names = [name for name in CHANGES if not asked.only or name in asked.only.split(";")]
    for seed in range(asked.seeds):  # seeds outermost: a table that is cut short has every row
        for name in names:
            rows = sheet["runs"].setdefault(name, {})
            if str(seed) not in rows:
                changed = replace(CHANGES[name][1](start), seed=seed)
                rows[str(seed)] = measured(changed, judge, validator, asked.num)
                print(name, seed, json.dumps(rows[str(seed)]), flush=True)
                if asked.json:
                    asked.json.write_text(json.dumps(sheet, indent=1))
    print(table(sheet["runs"]))


def table(runs: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown: each change's figures, and the difference from what it changes."""
    shown = {
        "kernel": ("kernel distance", 2),
        "asked": ("category accuracy, %", 1),
        "deviation": ("deviation", 3),
        "noise_mse": ("noise MSE", 4),
    }
    shown |= {
        f"guided_{key}": (f"{shown[key][0]}, guided", shown[key][1])
        for key in ("kernel", "asked", "deviation")
    }
    titles = ["part", "steps", *(part for title, _ in shown.values() for part in (title, "change"))]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, rows in runs.items():
        other = runs.get(CHANGES[name][0], {})
        means = {
            key: sum(row[key] for row in rows.values()) / len(rows)
            for key in next(iter(rows.values()))
        }
        cells = [
            f"{means[key]:.{digits}f} | {difference(rows, other, key, digits)}"
            for key, (_, digits) in shown.items()
        ]
        lines.append(f"| {name} | {means['steps']:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def difference(
    rows: dict[str, dict[str, float]], other: dict[str, dict[str, float]], key: str, digits: int
) -> str:
    """Mean over seeds of the paired difference, with its 95 % interval."""
    pairs = torch.tensor(
        [rows[seed][key] - other[seed][key] for seed in rows if seed in other], dtype=torch.float64
    )
    if not len(pairs):
        return ""
    if len(pairs) == 1:
        return f"{pairs.item():+.{digits}f}"
    half = float(student.ppf(0.975, len(pairs) - 1) * pairs.std() / math.sqrt(len(pairs)))
    return f"{pairs.mean():+.{digits}f} ± {half:.{digits}f}"


if __name__ == "__main__":
    main()
