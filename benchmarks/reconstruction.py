"""What images lose on the way through autoencoders: held-out images of a run, through its own and
through others.

    python benchmarks/reconstruction.py RUN [--others
    taesd_encoder.safetensors,taesd_decoder.safetensors FOLDER ...]
        [--json FILE] [--sheet FILE]

PSNR and SSIM are means over images, with 95 % intervals; rFD is the Fréchet distance between images
and reconstructions.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from machine import machine, report
from torch import Tensor

from sfumato.autoencoders import LatentAutoencoder
from sfumato.autoencoders.image_metrics import psnr, ssim
from sfumato.autoencoders.io import load
from sfumato.data import to_float
from sfumato.evaluation.distances import frechet_distance
from sfumato.evaluation.extractors import extractor
from sfumato.networks.perceptual import Features
from sfumato.observability.images import grid_image, save_png
from sfumato.recipes import resolve
from sfumato.runs.preparation import open_data
from sfumato.training import reconstruct

SHOWN = 10


def main() -> None:
    """Measure all, and draw the first images above what each made of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument(
        "--others",
        nargs="*",
        default=[],
        help="folders in diffusers' layout, or ENCODER,DECODER files",
    )
    parser.add_argument("--features", default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path)
    asked = parser.parse_args()
    dataset = open_data(resolve(asked.run))
    real = to_float(dataset.images(dataset.with_common_shape(dataset.holdout))[0])
    features = extractor(asked.features)
    candidates = {"own": load(asked.run / "autoencoder" / "final")}
    candidates |= {Path(name.split(",")[0]).stem: load(*name.split(",")) for name in asked.others}
    made = {name: through(autoencoder, real) for name, autoencoder in candidates.items()}
    figures = {
        name: {**shape(candidates[name]), **fidelity(real, made[name], features)} for name in made
    }
    result: dict[str, Any] = {
        "machine": machine(),
        "images": len(real),
        "extractor": features.name,
        "autoencoders": figures,
    }
    report(json.loads(json.dumps(result)), asked.json)
    if asked.sheet is not None:
        rows = torch.cat([real[:SHOWN], *(images[:SHOWN] for images in made.values())])
        save_png(grid_image((rows + 1) / 2, columns=SHOWN, row_labels=["real", *made]), asked.sheet)


def through(autoencoder: LatentAutoencoder, real: Tensor) -> Tensor:
    """Images in batches through the means of their latents, and back."""
    with torch.no_grad():
        return torch.cat([reconstruct(autoencoder.codec, part) for part in real.split(64)])


def shape(autoencoder: LatentAutoencoder) -> dict[str, Any]:
    """Its size, and how much smaller latents are."""
    size = sum(parameter.numel() for parameter in autoencoder.codec.parameters())
    squeezed = autoencoder.image_channels * autoencoder.factor**2 / autoencoder.latent_channels
    return {
        "parameters": size,
        "factor": autoencoder.factor,
        "channels": autoencoder.latent_channels,
        "times_fewer_values": squeezed,
    }


def fidelity(real: Tensor, made: Tensor, features: Features) -> dict[str, Any]:
    """PSNR in dB, SSIM, L1 in units of [0, 1], rFD."""
    rows = {
        "psnr": psnr(made, real),
        "ssim": ssim(made, real),
        "l1": (made - real).abs().flatten(1).mean(1) / 2,
    }
    figures: dict[str, Any] = {
        name: {
            "mean": float(values.mean()),
            "interval": 1.96 * float(values.std()) / math.sqrt(len(values)),
        }
        for name, values in rows.items()
    }
    with torch.no_grad():
        pooled = [
            torch.cat([features.pooled(part) for part in images.split(64)])
            for images in (real, made)
        ]
    return figures | {"rfd": frechet_distance(*pooled)}


if __name__ == "__main__":
    main()
