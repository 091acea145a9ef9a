"""Whether a plan is long enough for its dataset and fits the machine, and what to change if not."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sfumato.observability.progress import duration
from sfumato.platform import total_memory
from sfumato.runs.cost import CostEstimate

# Training samples in total, repeats included. docs/benchmarks.md, "Time to quality": at 32 px,
# 43,000 to 51,000 bring the kernel distance of the preset to 3 or 4, where the baselines end at 8;
# after a quarter of that it is at 7 (1.8 minutes).
ENOUGH, TOO_FEW = 45_000, 12_000
# Steps of an autoencoder at batch size 16. Two and a half minutes at 64 px end at 19 dB, and seven
# at 21.8 dB with reds still brown (docs/ablations.md, which does not say the steps); seven minutes
# have this many steps at 0.2 s a step.
AUTOENCODER_STEPS = 2_000
MANY_VIEWS = 200  # of each image
SMALL = 5_000  # images, below which many views of each are memorized
MEMORY_FRACTION = 0.9  # of the machine's memory that training may take


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A problem with a plan, and what to change."""

    what: str
    change: str

    def line(self) -> str:
        """Return the finding as a line of text."""
        return f"verdict: {self.what}; {self.change}"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The memory and disk space that a training can use, in GiB."""

    memory_gib: float
    disk_gib: float

    @classmethod
    def here(cls) -> Machine:
        """Return the memory of the training device and the free space of the working folder."""
        if torch.cuda.is_available():
            memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        else:
            memory = total_memory()
        return cls(memory_gib=memory / 2**30, disk_gib=shutil.disk_usage(Path.cwd()).free / 2**30)


def findings(
    stages: Sequence[CostEstimate], *, images: int, machine: Machine, from_scratch: bool = True
) -> list[Finding]:
    """Return the problems of a plan, the most serious first; [] if it is long enough and fits.

    Args:
        stages: the cost estimates, the diffusion model's last.
        images: number of training images.
        from_scratch: whether the model begins with random weights; how long a fine-tuning takes is
            said by its comparisons with the base.
    """
    if not from_scratch:
        return _resource_findings(stages, machine)
    *autoencoders, model = stages
    problems = [
        *_resource_findings(stages, machine),
        *(finding for stage in autoencoders for finding in _autoencoder_findings(stage)),
        *_length_findings(model),
    ]
    if model.epochs > MANY_VIEWS and images < SMALL:
        problems.append(
            Finding(
                what=f"{model.epochs:.0f} views of each image: more than {MANY_VIEWS} of a set "
                f"of {images} are memorized sooner or later",
                change=f"set budget.epochs={MANY_VIEWS}, add images, or set stop=overfitting",
            )
        )
    return problems


def _resource_findings(stages: Sequence[CostEstimate], machine: Machine) -> list[Finding]:
    memory, disk = (
        max(stage.memory_gib for stage in stages),
        sum(stage.disk_gib for stage in stages),
    )
    problems = []
    if memory > MEMORY_FRACTION * machine.memory_gib:
        problems.append(
            Finding(
                what=f"{memory:.1f} GiB of memory are needed, and this machine has "
                f"{machine.memory_gib:.1f} GiB",
                change="set micro_batch to a part of batch_size, or lower data.resolution, or "
                "use a smaller network",
            )
        )
    if disk > machine.disk_gib:
        problems.append(
            Finding(
                what=f"{disk:.2f} GiB of disk are needed, and {machine.disk_gib:.2f} GiB are free",
                change="free some space, or lower checkpoint.keep",
            )
        )
    return problems


def _autoencoder_findings(stage: CostEstimate) -> list[Finding]:
    if stage.steps >= AUTOENCODER_STEPS:
        return []
    return [
        Finding(
            what=f"{stage.steps} steps are too few for an autoencoder: below about "
            f"{AUTOENCODER_STEPS} its reconstructions are blurred and "
            "their colours wrong, and samples cannot be better than reconstructions",
            change=f"{_longer('autoencoder.budget', stage, AUTOENCODER_STEPS)}, lower "
            "data.resolution, or use a pretrained autoencoder",
        )
    ]


def _length_findings(model: CostEstimate) -> list[Finding]:
    if model.images >= ENOUGH:
        return []
    batch = model.images / model.steps
    enough = math.ceil(ENOUGH / batch)
    verdict = (
        "too short: rough shapes and colours at best"
        if model.images < TOO_FEW
        else "short: samples would still get better"
    )
    return [
        Finding(
            what=f"{verdict}: {model.images:,} training samples in total; about {ENOUGH:,} are "
            "enough at 32 px",
            change=f"{_longer('budget', model, enough)}, or lower data.resolution, or use a "
            "smaller network",
        )
    ]


def _longer(key: str, stage: CostEstimate, steps: int) -> str:
    """Return the setting that gives a stage `steps` steps, and how long they take on this machine."""
    seconds = steps * stage.seconds / stage.steps
    return f"set {key}.minutes={max(1, math.ceil(seconds / 60))} ({steps:,} steps, {duration(seconds)} on this machine)"
