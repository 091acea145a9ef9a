"""What a training on several processes would need, before there are any."""

from __future__ import annotations

from typing import get_args

import numpy as np

from sfumato.data import Dataset
from sfumato.data.batch_plan import share_of
from sfumato.distributed.engines import Footprint, copies_of, size_text
from sfumato.distributed.sharding import EngineName
from sfumato.errors import ConfigError
from sfumato.recipes.run import Run
from sfumato.runs.preparation import PreparedRun
from sfumato.runs.trainer_assembly import footprint

PER_MACHINE = 8
MOST_BATCHES = 1000  # that are looked at, of the first epoch


def world_lines(prepared: PreparedRun, size: int) -> list[str]:
    """Return lines about a training of `size` processes, up to 8 on each machine.

    Raises:
        ConfigError: if they cannot share a batch, or fill machines unevenly.
    """
    run, dataset = prepared.run, prepared.dataset
    per_machine = min(PER_MACHINE, size)
    if size < 1 or size % per_machine:
        raise ConfigError(
            f"{size} processes", where="--world", hint=f"below {PER_MACHINE}, or a multiple of it"
        )
    share = share_of(run.batch_size, size)
    machines = size // per_machine
    return [
        f"{size} processes on {machines} machine{'s' if machines > 1 else ''}: each trains on {share} of the "
        f"{run.batch_size} images of a batch; {_coverage(run, dataset, size)}",
        memory_line(footprint(run, prepared.model.network), size=size, per_machine=per_machine),
    ]


def _coverage(run: Run, dataset: Dataset, size: int) -> str:
    """Say whether the shares of all processes are the batches of one, each image once an epoch."""
    plan = dataset.plan(seed=run.seed, batch_size=run.batch_size)
    batches = -(-plan.size // run.batch_size)
    looked_at = min(batches, MOST_BATCHES)
    shares = [
        plan.batch(step, rank=rank, ranks=size) for step in range(looked_at) for rank in range(size)
    ]
    seen = np.concatenate(shares)
    same = np.array_equal(seen, plan.samples(0, looked_at * run.batch_size))
    once = len(np.unique(seen[: plan.size])) == min(plan.size, len(seen))
    assert same, "the shares of all processes are not the batches of one"
    assert once, "an image comes twice in an epoch"
    return (
        f"their shares of the first {looked_at} of {batches} batches of an epoch are disjoint, and hold "
        f"the images that one process would see"
    )


def memory_line(needs: Footprint, *, size: int, per_machine: int) -> str:
    """Return one line about the memory of each process under every engine."""
    names: list[EngineName] = [name for name in get_args(EngineName) if name != "auto"]
    parts = []
    for name in names:
        shards = size // copies_of(name, size=size, per_machine=per_machine)
        parts.append(f"{size_text(needs.gib(shards))} with distributed={name}")
    return (
        "weights, gradients, moments and averages take in each process " + ", ".join(parts) + "; "
        "activations not counted"
    )
