"""The command `sfumato slurm`: a batch script for a cluster."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

SCRIPT = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={per_node}
#SBATCH --gpus-per-node={per_node}
#SBATCH --time={time}
#SBATCH --output={run}-%j.log
# five minutes before the time limit training stops with a checkpoint, and this script goes on
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append

# one process for each GPU: they find each other on the first machine
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
newest() {{ ls -1 {checkpoints} 2> /dev/null | sort | tail -n 1; }}
before=$(newest)

# the same command begins the run and, when the job is started again, resumes it
srun --kill-on-bad-exit=1 bash -c \\
  'WORLD_SIZE={size} LOCAL_WORLD_SIZE={per_node} RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"' sfumato \\
  {command}
code=$?
# a job that has saved something new goes on: 143 at the time limit, others where a process was lost or hung
case $code in
  0 | 2 | 3) ;;
  *) if [ "$(newest)" != "$before" ]; then scontrol requeue "$SLURM_JOB_ID"; fi ;;
esac
exit $code
"""


def slurm(
    source: Annotated[str, typer.Argument(help="What to train: as for `sfumato train`.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings, as for `sfumato train`.", metavar="[KEY=VALUE]..."),
    ] = None,
    run: Annotated[
        Path, typer.Option(help="Directory of the run, on a disk that all machines see.")
    ] = Path("run"),
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs, and so processes, on each.")] = 8,
    time: Annotated[str, typer.Option(help="Time limit, as Slurm writes it.")] = "24:00:00",
) -> None:
    """Print a batch script for Slurm that trains on several machines and goes on after each time limit:
    `sfumato slurm RECIPE --nodes 4 > job.sh; sbatch job.sh`.
    """
    from sfumato.data.batch_plan import share_of
    from sfumato.recipes import early_checks
    from sfumato.recipes.resolver import resolve_config
    from sfumato.storage.output_paths import safe_name

    early_checks.require(source, overrides or ())
    share_of(resolve_config(source, overrides or ()).run.batch_size, nodes * gpus)
    command = ["sfumato", "train", source, *(overrides or ()), "--run", str(run), "--resume"]
    typer.echo(
        SCRIPT.format(
            name=safe_name(run.name), nodes=nodes, per_node=gpus, time=shlex.quote(time),
            run=shlex.quote(str(run)), command=shlex.join(command), size=nodes * gpus,
            checkpoints=shlex.quote(str(run / "checkpoints")),
        ),
        nl=False,
    )  # fmt: skip
