"""Images per second of sampling: sfumato's driver beside diffusers' DDIM pipeline, equal steps,
networks of nearly equal size.

    python benchmarks/sampling.py [--quick] [--json FILE] [--resolution 32] [--batch 32] [--steps 8]

Also how near the measured bfloat16 peak each is, and the share of the time that is not the network:
our whole trajectory against the bare
network called as often; and of a whole `Pipeline.sample` with guidance, keyed noise and images at
the end, against the bare network on
twice the batch.
"""

from __future__ import annotations

import statistics

import torch
from machine import flops, interleaved, machine, options, paired_ratio, peaks, report
from peer_unconditional import PeerSampler, build_peer
from train_step import NETWORK, PEER_PARAMETERS

from sfumato.autoencoders import Pixels
from sfumato.condition import NO_CONDITION
from sfumato.conditioners import CategoryConfig, CompositeConditioner, ConditioningInfo
from sfumato.contexts import ContextConfig
from sfumato.diffusion import Linear
from sfumato.generation.diffusion_model import DenoiserConfig, Model, SamplingConfig
from sfumato.generation.pipeline import Pipeline
from sfumato.networks import UNet
from sfumato.sampling import DDIM, DPMSolverPP2M, grid, sample


def guided(resolution: int, steps: int, device: torch.device) -> Pipeline:
    """An untrained model steered by two categories, with guidance."""
    info = ConditioningInfo(channels=3, categories=("a", "b"))
    conditioner = ContextConfig(category=CategoryConfig()).build(info, encoder=lambda config: None)
    network = NETWORK.build(image_channels=3, context=conditioner.sizes)
    model = Model(network, conditioner, DenoiserConfig()).to(device).eval().requires_grad_(False)
    return Pipeline(
        model=model,
        autoencoder=Pixels(3),
        sampling=SamplingConfig(guidance=1.5, steps=steps),
        info=info,
        image_shape=(3, resolution, resolution),
        compute_dtype=torch.bfloat16,
    )


def main() -> None:
    """Time all candidates in turn and print the ratios."""
    asked = options(__doc__.splitlines()[0], resolution=32, batch=32, steps=8, rounds=5)
    rounds, steps = (2, 4) if asked.quick else (asked.rounds, asked.steps)
    batch = min(asked.batch, 16) if asked.quick else asked.batch
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = (
        Model(UNet(NETWORK, image_channels=3), CompositeConditioner({}), DenoiserConfig())
        .to(device)
        .eval()
        .requires_grad_(False)
    )
    x, levels = (
        torch.randn(batch, 3, asked.resolution, asked.resolution, device=device),
        grid(Linear(), steps),
    )
    noise_input = torch.full((batch,), 500.0, device=device)

    def bare(dtype: torch.dtype) -> None:
        for _ in range(steps):
            with (
                torch.no_grad(),
                torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32),
            ):
                model.network(x, noise_input, NO_CONDITION)

    pipeline = guided(asked.resolution, steps, device)
    with torch.no_grad():
        both = pipeline.model.conditioner(
            {"category": torch.zeros(2 * batch, dtype=torch.long, device=device)}, 2 * batch
        )

    def bare_guided() -> None:
        for _ in range(steps):
            with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
                pipeline.model.network(
                    torch.cat([x, x]), torch.cat([noise_input, noise_input]), both
                )

    candidates, peer = {}, build_peer(PEER_PARAMETERS, asked.resolution, 64)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        theirs = PeerSampler(
            peer.to(device), steps=steps, batch=batch, dtype=dtype, channels_last=True
        )
        candidates |= {
            f"ours DDIM {name}": lambda d=dtype: sample(DDIM(), model.denoiser(d), x, levels),
            f"ours DPM-Solver++(2M) {name}": lambda d=dtype: sample(
                DPMSolverPP2M(), model.denoiser(d), x, levels
            ),
            f"bare network {name}": lambda d=dtype: bare(d),
            f"diffusers DDIM {name}": theirs,
        }
    defaults = PeerSampler(
        build_peer(PEER_PARAMETERS, asked.resolution, 8).to(device), steps=steps, batch=batch
    )
    candidates["diffusers DDIM at its defaults"] = defaults
    candidates["ours guided, whole, bfloat16"] = lambda: pipeline.sample(
        batch, category="a", batch_size=batch
    )
    candidates["bare network guided, bfloat16"] = bare_guided
    times, peak = interleaved(candidates, rounds), peaks()

    figures = {
        name: {
            "images_per_s": batch / statistics.median(taken),
            "gflop_per_image": (work := flops(candidates[name])) / batch / 1e9,
            "of_convolution_peak": work
            / statistics.median(taken)
            / 1e9
            / peak["convolution_gflops"],
        }
        for name, taken in times.items()
    }
    ratio = {
        f"diffusers DDIM {name}": paired_ratio(
            times[f"ours DDIM {name}"], times[f"diffusers DDIM {name}"]
        )
        for name in ("float32", "bfloat16")
    }
    ratio["diffusers DDIM at its defaults"] = paired_ratio(
        times["ours DDIM float32"], times["diffusers DDIM at its defaults"]
    )
    overhead = {
        name: 1 - 1 / paired_ratio(times[f"bare network {name}"], times[f"ours DDIM {name}"])
        for name in ("float32", "bfloat16")
    }
    overhead["guided, whole, bfloat16"] = 1 - 1 / paired_ratio(
        times["bare network guided, bfloat16"], times["ours guided, whole, bfloat16"]
    )
    result = {
        "machine": machine(),
        "batch": batch,
        "resolution": asked.resolution,
        "steps": steps,
        "rounds": rounds,
        "peak": peak,
        "ours": {name: row for name, row in figures.items() if not name.startswith("diffusers")},
        "peers": {name: row for name, row in figures.items() if name.startswith("diffusers")},
        "ratio": ratio,
        "overhead_over_bare_network": overhead,
    }
    report(result, asked.json)


if __name__ == "__main__":
    main()
