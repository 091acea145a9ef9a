"""What falls to each process, and how what they found is put together."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sfumato.condition import ContextSizes
from sfumato.distributed import engines
from sfumato.distributed.world import World, alone, current
from sfumato.errors import ConfigError
from sfumato.networks import DiTConfig
from sfumato.recipes import Run
from sfumato.runs.trainer_assembly import footprint
from sfumato.training import Budget
from tests.distributed.conftest import Runs, difference

SOURCE = Path(__file__).parents[2] / "src" / "sfumato"


class Told(World):
    """A process of several, which is told what the others have."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank)
        self.size = size
        self.parts: list[torch.Tensor] = []

    def gather_equal(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return self.parts


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 31])
def test_spans_are_equally_long_and_together_everything_once(count: int, size: int) -> None:
    rows = torch.arange(count)
    worlds = [Told(rank, size) for rank in range(size)]
    parts = [rows[world.span(count)] for world in worlds]
    assert len({len(part) for part in parts}) == 1
    for world, part in zip(worlds, parts, strict=True):
        world.parts = parts
        assert torch.equal(world.join_spans(part, count), rows)


def test_a_process_that_works_alone_asks_nobody_and_keeps_its_number() -> None:
    with alone(3):
        world = current()
        assert (world.rank, world.size, world.is_first) == (3, 1, False)
        assert world.gather({"a": 1}) == [{"a": 1}]
    assert current().is_first


GIB = engines.GIB // 4  # parameters of a GiB
LARGE = engines.Footprint(parameters=10 * GIB, trained=10 * GIB, averages=1, largest_unit=GIB // 4)


@pytest.mark.parametrize(
    ("memory_gib", "size", "per_machine", "expected"),
    [(101, 8, 8, "replicate"), (99, 8, 8, "shard"), (20, 64, 8, "hybrid"), (10, 64, 8, "shard")],
)
def test_the_engine_is_the_one_with_the_least_communication_that_fits(
    memory_gib: float, size: int, per_machine: int, expected: str
) -> None:
    assert (
        engines.choose_name(
            "auto", LARGE, memory_gib=memory_gib, size=size, per_machine=per_machine
        )
        == expected
    )


def test_what_each_process_holds() -> None:
    assert LARGE.gib() == 50  # weights, gradient, two moments and an average
    assert LARGE.gib(10) == 5 + 0.5  # and a unit with its gradient
    frozen = engines.Footprint(parameters=10 * GIB, trained=GIB, averages=1, largest_unit=0)
    assert frozen.gib() == 14
    assert engines.copies_of("hybrid", size=64, per_machine=8) == 8
    with pytest.raises(ConfigError, match="not a multiple"):
        engines.copies_of("hybrid", size=9, per_machine=8)


def test_only_one_package_knows_torch_distributed() -> None:
    found = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            if any(name.startswith("torch.distributed") for name in names):
                found.append(path.relative_to(SOURCE).parts[0])
    assert set(found) == {"distributed"}


def test_the_largest_networks_in_each_process() -> None:
    """DiT-XL/2 as measured with a fake group of 64 processes: 8.57, 1.07 and 0.14 GiB, without the
    gathered block.
    """
    with torch.device("meta"):
        network = DiTConfig(hidden_size=1152, depth=28, head_dim=72).build(
            image_channels=4, context=ContextSizes(vector=1152)
        )
    needs = footprint(Run(name="xl", budget=Budget(steps=1)), network)
    block = 2 * 4 * needs.largest_unit / engines.GIB
    assert needs.gib() == pytest.approx(8.57, rel=0.02)
    assert needs.gib(8) - block == pytest.approx(1.07, rel=0.02)
    assert needs.gib(64) - block == pytest.approx(0.14, rel=0.06)


FAKE = """#!/bin/bash
# a Slurm of one machine: as many processes as tasks
if [ "$(basename "$0")" = scontrol ]; then
  if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> {place}/requeued; fi
  exit 0
fi
while [[ "$1" == --* ]]; do shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & pids="$pids $!"
done
code=0
for pid in $pids; do wait $pid || code=$?; done
exit $code
"""


def test_the_batch_script_trains_on_all_tasks_and_the_same_job_goes_on(
    runs: Runs, tmp_path: Path
) -> None:
    for name in ("srun", "scontrol"):
        (tmp_path / name).write_text(FAKE.format(place=tmp_path))
        (tmp_path / name).chmod(0o755)
    (tmp_path / "sfumato").write_text(f'#!/bin/bash\nexec {sys.executable} -m sfumato "$@"\n')
    (tmp_path / "sfumato").chmod(0o755)
    run = runs.lab.new("a run's place")
    script = ("slurm", runs.recipe("pixel"), "--run", run, "--nodes", "1", "--gpus", "2")
    code, said = runs.lab.call(*script, "budget.steps=20")
    assert code == 0, said
    (tmp_path / "job.sh").write_text(said)
    done = subprocess.run(
        ["bash", str(tmp_path / "job.sh")],
        env={
            **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "CI": "1",
            "SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "here",
            "GLOO_SOCKET_IFNAME": "lo",
        },
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert difference(run, runs.alone("pixel")) == 0
    assert not (tmp_path / "requeued").exists()


def test_a_batch_script_for_processes_that_cannot_share_a_batch_is_refused(runs: Runs) -> None:
    code, said = runs.lab.call("slurm", runs.recipe("pixel"), "--gpus", "3")
    assert (code, "cannot be shared evenly by 3" in said) == (2, True)


def test_a_dry_run_says_what_many_processes_would_share_and_hold(runs: Runs) -> None:
    code, said = runs.lab.call("train", runs.recipe("shapes"), "--dry-run", "--world", "8")
    assert code == 0, said
    assert "8 processes on 1 machine: each trains on 1 of the 8 images" in said
    assert "are disjoint" in said
    assert "MiB with distributed=hybrid" in said
    code, said = runs.lab.call("train", runs.recipe("shapes"), "--dry-run", "--world", "12")
    assert (code, "multiple of it" in said) == (2, True)
