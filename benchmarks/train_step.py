"""Images per second of a training step: sfumato's trainer beside diffusers' unconditional example
loop, as many parameters (within 6 %).

    python benchmarks/train_step.py [--quick] [--json FILE] [--resolution 32] [--batch 64]

Ours is `Trainer.train_step` whole: keyed noise, loss, backward, clipping, AdamW, average. Theirs is
the example's step, once at its
defaults (float32, heads of 8 channels) and once at its best (heads of 64 channels, channels_last).
Ours, the peer at its best and the peaks
are in the precision that is fastest on this machine, which is printed with the figures.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from machine import fastest, flops, interleaved, machine, options, paired_ratio, peaks, report
from peer_unconditional import PeerTrainer, build_peer
from PIL import Image

from sfumato.data import Batch, DataConfig, Folder, ShapeGroup, index
from sfumato.distributed.sharding import EngineName
from sfumato.networks import NetworkConfig, UNetConfig
from sfumato.recipes import Run
from sfumato.runs.cost import trial_trainer
from sfumato.runs.preparation import PreparedRun, build_model, conditioning_info
from sfumato.training import Budget, FixedEMA, Trainer, ValidationConfig

NETWORK = UNetConfig(
    channels=64, multipliers=(1, 2, 2), blocks=2, attention_depths=(2,), head_channels=64
)
PEER_PARAMETERS = 6_500_000  # widths (64, 128, 128) as ours has: 6.47M there, 6.83M here


def our_trainer(
    resolution: int,
    batch: int,
    folder: Path,
    precision: str,
    network: NetworkConfig = NETWORK,
    channels: int = 3,
    distributed: EngineName = "replicate",
) -> Trainer:
    """A trainer of the default U-Net, or another; the images on disk are only there because a
    trainer wants some.
    """
    generator = np.random.default_rng(0)
    for number in range(16):
        Image.fromarray(generator.integers(0, 256, (resolution, resolution, 3), np.uint8)).save(
            folder / f"{number}.png"
        )
    run = Run(
        name="benchmark",
        data=DataConfig(source=Folder(str(folder)), resolution=resolution),
        network=network,
        batch_size=batch,
        ema=FixedEMA(0.9999),
        budget=Budget(steps=10**6),
        validation=ValidationConfig(samples=10),
        precision=precision,
        distributed=distributed,
    )
    dataset = index(run.data)
    info = conditioning_info(run, dataset)
    model = build_model(run, info)
    model.network = network.build(image_channels=channels)
    prepared = PreparedRun(run=run, dataset=dataset, info=info, model=model)
    return trial_trainer(prepared, folder / "run")


def main() -> None:
    """Time all candidates in turn and print the ratios."""
    asked = options(__doc__.splitlines()[0], resolution=32, batch=64, rounds=7)
    rounds = 3 if asked.quick else asked.rounds
    asked.batch = min(asked.batch, 16) if asked.quick else asked.batch
    precision = fastest()
    images = torch.rand(asked.batch, 3, asked.resolution, asked.resolution) * 2 - 1
    with tempfile.TemporaryDirectory() as folder:
        trainer = our_trainer(asked.resolution, asked.batch, Path(folder), precision)
        device = trainer.device
        batch = Batch(
            first=0, size=len(images), groups=[ShapeGroup(first=0, images=images, context={})]
        )
        parameters = sum(p.numel() for p in trainer.state.model.parameters())
        peer_defaults = PeerTrainer(
            build_peer(PEER_PARAMETERS, asked.resolution, 8).to(device),
            bf16=False,
            channels_last=False,
            ema=False,
        )
        peer_best = PeerTrainer(
            build_peer(PEER_PARAMETERS, asked.resolution, 64).to(device),
            bf16=precision == "bfloat16",
            channels_last=True,
            ema=False,
        )
        candidates = {
            "ours": lambda: trainer.train_step(batch),
            "diffusers at its defaults": lambda: peer_defaults.step(images.to(device)),
            "diffusers at its best": lambda: peer_best.step(images.to(device)),
        }
        work = {name: flops(step) for name, step in candidates.items()}
        times = interleaved(candidates, rounds)
        peak = peaks(5 if asked.quick else 15, precision)
    figures = {
        name: {
            "images_per_s": asked.batch / statistics.median(taken),
            "images_per_s_best": asked.batch / min(taken),
            "gflop_per_image": work[name] / asked.batch / 1e9,
            "gflops": work[name] / statistics.median(taken) / 1e9,
            "of_convolution_peak": work[name]
            / statistics.median(taken)
            / 1e9
            / peak["convolution_gflops"],
        }
        for name, taken in times.items()
    }
    figures["ours"]["parameters"] = parameters
    for name, peer in (
        ("diffusers at its defaults", peer_defaults),
        ("diffusers at its best", peer_best),
    ):
        figures[name]["parameters"] = sum(p.numel() for p in peer.model.parameters())
    ours = figures.pop("ours")
    result = {
        "machine": machine(),
        "batch": asked.batch,
        "resolution": asked.resolution,
        "rounds": rounds,
        "precision": precision,
        "peak": peak,
        "ours": ours,
        "peers": figures,
        "ratio": {name: paired_ratio(times["ours"], times[name]) for name in figures},
    }
    report(result, asked.json)


if __name__ == "__main__":
    main()
