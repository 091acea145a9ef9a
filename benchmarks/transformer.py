"""Training steps and sampling of diffusion transformers S, B and XL and a U-Net on 32 x 32 latents
(256 px), beside diffusers' DiT.

    python benchmarks/transformer.py [--quick] [--only DiT-S/2] [--rounds 5] [--json FILE]

Ours is `Trainer.train_step` whole; theirs is the example's step around `DiTTransformer2DModel` of
the same width, depth and patch, under
bfloat16 autocast. Both as they are and compiled (on a GPU). Of each: images/s, model FLOPs, and the
share of the matrix-product peak that
was measured in the same process (and, on a GPU, of what its maker states for dense bfloat16).
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from machine import flops, interleaved, machine, options, paired_ratio, peaks, report
from peer_unconditional import PeerTrainer
from train_step import our_trainer

from sfumato.condition import NO_CONDITION
from sfumato.data import Batch, ShapeGroup
from sfumato.diffusion import Linear
from sfumato.networks import DiTConfig, NetworkConfig, UNetConfig
from sfumato.nn.compiling import compile_in_place
from sfumato.sampling import DPMSolverPP2M, grid, sample

SIDE, CHANNELS, SAMPLED_STEPS = 32, 4, 10
STATED = {"H200": 989e3, "H100": 989e3, "A100": 312e3}  # GFLOP/s, dense bfloat16
SIZES: dict[str, tuple[NetworkConfig, int]] = {  # and the batch on a GPU
    "DiT-S/2": (DiTConfig(hidden_size=384, depth=12), 256),
    "DiT-B/2": (DiTConfig(hidden_size=768, depth=12), 256),
    "DiT-XL/2": (DiTConfig(hidden_size=1152, depth=28), 128),
    "U-Net": (UNetConfig(channels=256, multipliers=(1, 2, 2), attention_depths=(1, 2)), 128),
}


def peer(config: DiTConfig, channels: int) -> DiTTransformer2DModel:
    """diffusers' transformer of the same size."""
    return DiTTransformer2DModel(
        num_attention_heads=config.channels // 64,
        attention_head_dim=64,
        in_channels=channels,
        out_channels=channels,
        num_layers=config.layers,
        sample_size=SIDE,
        patch_size=config.patch,
        num_embeds_ada_norm=1000,
    )


def candidates(
    network: NetworkConfig, batch: int, folder: Path, device: torch.device, *, compiled: bool
) -> dict[str, Any]:
    """Training steps and a trajectory, each a call."""
    trainer = our_trainer(SIDE, batch, folder, "bfloat16", network, CHANNELS)
    if compiled:
        trainer.task.core(trainer.state.model).compile()
    images = torch.rand(batch, CHANNELS, SIDE, SIDE, device=device) * 2 - 1
    given = Batch(
        first=0, size=len(images), groups=[ShapeGroup(first=0, images=images.cpu(), context={})]
    )
    found: dict[str, Callable[[], object]] = {"ours": lambda: trainer.train_step(given)}
    if isinstance(network, DiTConfig):
        theirs = PeerTrainer(peer(network, CHANNELS).to(device), bf16=True)
        if compiled:
            theirs.model.compile()
        labels = torch.randint(1000, (batch,), device=device)
        found["diffusers"] = lambda: theirs.step(images, labels)
    model, x, levels = (
        trainer.state.average,
        torch.randn(batch, CHANNELS, SIDE, SIDE, device=device),
        grid(Linear(), SAMPLED_STEPS),
    )
    if compiled:  # as `sfumato sample --compile` does
        compile_in_place(
            model.network, mode="reduce-overhead" if device.type == "cuda" else "default"
        )
    found["ours, sampling"] = lambda: sample(
        DPMSolverPP2M(), model.denoiser(torch.bfloat16), x, levels
    )

    def bare() -> None:
        level = torch.full((batch,), 500.0, device=device)
        for _ in range(SAMPLED_STEPS):
            with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
                model.network(x, level, NO_CONDITION)

    found["bare network, sampling"] = bare
    return found


def measured(
    name: str, rounds: int, batch: int, peak: float, stated: float | None, *, compiled: bool
) -> dict[str, Any]:
    """Figures of one size."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        found = candidates(SIZES[name][0], batch, Path(folder), device, compiled=compiled)
        work = {}
        for key, call in found.items():
            with (
                contextlib.nullcontext()
                if not compiled
                else torch.compiler.set_stance("force_eager")
            ):
                work[key] = flops(call)
        times = interleaved(found, rounds)
    rows = {}
    for key, taken in times.items():
        speed = work[key] / statistics.median(taken) / 1e9
        rows[key] = {
            "images_per_s": batch / statistics.median(taken),
            "gflop_per_image": work[key] / batch / 1e9,
            "gflops": speed,
            "of_measured_peak": speed / peak,
            "of_stated_peak": None if stated is None else speed / stated,
        }
    ratios = {
        "sampling over the bare network": 1
        / paired_ratio(times["bare network, sampling"], times["ours, sampling"])
    }
    if "diffusers" in times:
        ratios["diffusers"] = paired_ratio(times["ours"], times["diffusers"])
    return {"batch": batch, "rows": rows, "ratio": ratios}


def main() -> None:
    """Each size by itself."""
    asked = options(__doc__.splitlines()[0], rounds=5, only="", batch=0)
    gpu = torch.cuda.is_available()
    peak, name = peaks()["matmul_gflops"], torch.cuda.get_device_name() if gpu else ""
    stated = next((value for part, value in STATED.items() if part in name), None)
    result: dict[str, Any] = {
        "machine": machine(),
        "peak_gflops": peak,
        "stated_gflops": stated,
        "sizes": {},
    }
    for size, (_, batch) in SIZES.items():
        if size not in (
            asked.only.split(",")
            if asked.only
            else list(SIZES)[: 1 if asked.quick or not gpu else None]
        ):
            continue
        for compiled in (False, True) if gpu else (False,):
            key = f"{size}, compiled" if compiled else size
            count = asked.batch or (batch if gpu else 4 if asked.quick else 32)
            rounds = 1 if asked.quick else asked.rounds
            result["sizes"][key] = measured(size, rounds, count, peak, stated, compiled=compiled)
            print(key, result["sizes"][key]["ratio"], flush=True)
            gc.collect()  # compiled modules are cycles
            torch.compiler.reset()
            if gpu:
                torch.cuda.empty_cache()
    report(result, asked.json)


if __name__ == "__main__":
    main()
