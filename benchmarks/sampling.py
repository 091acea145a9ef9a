"""Images per second of sampling: sfumato's driver beside diffusers' DDIM pipeline, equal steps, networks of nearly equal size.

    python benchmarks/sampling.py [--quick] [--json FILE] [--resolution 32] [--batch 64] [--steps 10]

Also the share of the time that is not the network: our whole trajectory against the bare network called as often.
"""

from __future__ import annotations

import statistics

import torch
from machine import interleaved, machine, options, paired_ratio, report
from peer_unconditional import PeerSampler, build_peer
from train_step import NETWORK, PEER_PARAMETERS

from sfumato.condition import NO_CONDITION
from sfumato.conditioners import Joint
from sfumato.diffusion import Linear
from sfumato.networks import UNet
from sfumato.pipeline import DenoiserConfig, Model
from sfumato.sampling import DDIM, DPMSolverPP2M, grid, sample


def main() -> None:
    """Time all candidates in turn and print the ratios."""
    asked = options(__doc__.splitlines()[0], resolution=32, batch=64, steps=10, rounds=5)
    rounds, steps = (2, 4) if asked.quick else (asked.rounds, asked.steps)
    batch = min(asked.batch, 16) if asked.quick else asked.batch
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = Model(UNet(NETWORK, image_channels=3), Joint({}), DenoiserConfig()).to(device).eval().requires_grad_(False)
    x, levels = torch.randn(batch, 3, asked.resolution, asked.resolution, device=device), grid(Linear(), steps)
    noise_input = torch.full((batch,), 500.0, device=device)

    def bare(dtype: torch.dtype) -> None:
        for _ in range(steps):
            with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
                model.network(x, noise_input, NO_CONDITION)

    candidates, peer = {}, build_peer(PEER_PARAMETERS, asked.resolution, 64)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        theirs = PeerSampler(peer.to(device), steps=steps, batch=batch, dtype=dtype, channels_last=True)
        candidates |= {
            f"ours DDIM {name}": lambda d=dtype: sample(DDIM(), model.denoiser(d), x, levels),
            f"ours DPM-Solver++(2M) {name}": lambda d=dtype: sample(DPMSolverPP2M(), model.denoiser(d), x, levels),
            f"bare network {name}": lambda d=dtype: bare(d),
            f"diffusers DDIM {name}": theirs,
        }
    defaults = PeerSampler(build_peer(PEER_PARAMETERS, asked.resolution, 8).to(device), steps=steps, batch=batch)
    candidates["diffusers DDIM at its defaults"] = defaults
    times = interleaved(candidates, rounds)

    figures = {name: {"images_per_s": batch / statistics.median(taken)} for name, taken in times.items()}
    ratio = {
        f"diffusers DDIM {name}": paired_ratio(times[f"ours DDIM {name}"], times[f"diffusers DDIM {name}"])
        for name in ("float32", "bfloat16")
    }
    ratio["diffusers DDIM at its defaults"] = paired_ratio(times["ours DDIM float32"], times["diffusers DDIM at its defaults"])
    overhead = {
        name: 1 - 1 / paired_ratio(times[f"bare network {name}"], times[f"ours DDIM {name}"])
        for name in ("float32", "bfloat16")
    }
    result = {
        "machine": machine(), "batch": batch, "resolution": asked.resolution, "steps": steps, "rounds": rounds,
        "ours": {name: row for name, row in figures.items() if not name.startswith("diffusers")},
        "peers": {name: row for name, row in figures.items() if name.startswith("diffusers")},
        "ratio": ratio, "overhead_over_bare_network": overhead,
    }  # fmt: skip
    report(result, asked.json)


if __name__ == "__main__":
    main()
