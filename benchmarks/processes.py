"""What it costs that several processes share a training step, at the same global batch.

    python benchmarks/processes.py [--quick] [--rounds 5] [--json FILE]

One process and two, one thread each, on this machine; with several GPUs, one process and one for each
GPU. Of several processes, the time until all have their gradients (waiting) is apart from what is left of their sum
after the backward pass (communication). Runs are interleaved: rounds of all cases, each in new processes.

What 8 and 64 processes would take is computed on paper from the step time of one process at the share of
a batch that each would have, and the published speeds of links; nothing of it is measured.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import machine, options, report
from train_step import NETWORK, our_trainer

from sfumato.data import Batch, ShapeGroup
from sfumato.distributed import joined
from sfumato.distributed.gradient_sum import GradientSum
from sfumato.distributed.world import STORE
from sfumato.networks import DiTConfig
from sfumato.training.parameters import count

SIDE, BATCH, STEPS = 32, 32, 6
NETWORKS = {"U-Net": NETWORK, "DiT-S/2": DiTConfig(hidden_size=384, depth=12)}
MANY = max(2, torch.cuda.device_count())
CASES = {"one": (1, "replicate"), "replicate": (MANY, "replicate"), "shard": (MANY, "shard")}
# bytes a second in each direction, of one GPU: NVLink 4 within a machine (450 GB/s), and a machine's eight
# 400 Gb/s adapters between machines (NVIDIA's data sheets of the H100 and of DGX H100)
LINKS = {8: 450e9, 64: 50e9}


def share(rank: int, size: int, side: int, batch: int) -> Batch:
    """The part of a batch that one process trains on."""
    each = batch // size
    images = torch.rand(each, 3, side, side) * 2 - 1
    return Batch(
        first=0, size=batch, groups=[ShapeGroup(first=rank * each, images=images, context={})]
    )


def work(name: str, engine: str, batch: int) -> dict[str, Any]:
    """Time the steps of one process; the first two warm up."""
    torch.set_num_threads(1)
    with joined() as world, tempfile.TemporaryDirectory() as folder:
        trainer = our_trainer(
            SIDE, batch, Path(folder), "float32", NETWORKS[name], distributed=engine
        )
        given, spent = share(world.rank, world.size, SIDE, batch), {"waiting": 0.0, "sum": 0.0}
        finish = GradientSum.finish

        def timed(summed: GradientSum) -> None:
            begun = time.perf_counter()
            world.gather(0)
            ready = time.perf_counter()
            finish(summed)
            spent["waiting"] += ready - begun
            spent["sum"] += time.perf_counter() - ready

        GradientSum.finish = timed  # type: ignore[method-assign]
        steps = []
        for number in range(STEPS):
            if number == 2:
                spent.update(waiting=0.0, sum=0.0)
            begun = time.perf_counter()
            trainer.train_step(given)
            steps.append(time.perf_counter() - begun)
        measured = STEPS - 2
        return {
            "step_s": statistics.median(steps[2:]),
            "waiting_s": spent["waiting"] / measured,
            "sum_s": spent["sum"] / measured,
            "parameters": count(trainer.state.model.parameters()),
        }


def run(name: str, size: int, engine: str, batch: int) -> dict[str, Any]:
    """Run `size` processes to their end; return what the first one found."""
    with tempfile.TemporaryDirectory() as folder:
        shared = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            STORE: f"{folder}/store",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--worker", name, engine, str(batch), f"{folder}/{rank}.json"],
                env={**shared, "WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )
            for rank in range(size)
        ]  # fmt: skip
        assert [process.wait() for process in processes] == [0] * size
        result: dict[str, Any] = json.loads(Path(folder, "0.json").read_text())
        return result


def on_paper(one: dict[str, Any], smaller: dict[str, Any], size: int) -> dict[str, float]:
    """What `size` processes would take on a batch of `size` shares: the step of a share, and a sum of all
    gradients in a ring, 2 (W - 1) / W times their bytes over the slowest link, not overlapped.
    """
    communication = 2 * (size - 1) / size * 4 * one["parameters"] / LINKS[size]
    return {
        "communication_s": communication,
        "of_step": communication / (smaller["step_s"] + communication),
    }


def main() -> None:
    """Take all cases in turn."""
    asked = options(__doc__.splitlines()[0], rounds=5)
    rounds = 1 if asked.quick else asked.rounds
    rows: dict[str, Any] = {}
    for name in ("U-Net",) if asked.quick else tuple(NETWORKS):
        found: dict[str, list[dict[str, Any]]] = {case: [] for case in (*CASES, "share")}
        for _ in range(rounds):
            for case, (size, engine) in CASES.items():
                found[case].append(run(name, size, engine, BATCH))
            found["share"].append(run(name, 1, "replicate", BATCH // MANY))
        rows[name] = {
            case: {key: statistics.median(each[key] for each in taken) for key in taken[0]}
            for case, taken in found.items()
        }
        for case in ("replicate", "shard", "share"):
            rows[name][case]["faster_than_one"] = statistics.median(
                one["step_s"] / other["step_s"]
                for one, other in zip(found["one"], found[case], strict=True)
            )
        rows[name]["on paper"] = {
            size: on_paper(rows[name]["one"], rows[name]["share"], size) for size in LINKS
        }
        print(name, json.dumps(rows[name], indent=1), flush=True)
    report(
        {"machine": machine(), "rounds": rounds, "batch": BATCH, "processes": MANY, "ours": rows},
        asked.json,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        name, engine, batch, place = sys.argv[2:]
        Path(place).write_text(json.dumps(work(name, engine, int(batch))))
    else:
        main()
