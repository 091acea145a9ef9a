"""Whether a plan is long enough for its dataset and fits the machine, and what to change if not."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfumato.data.holdout import expected_holdout
from sfumato.observability.progress import duration
from sfumato.platform import total_memory
from sfumato.recipes.run import Run
from sfumato.runs.cost import CostEstimate
from sfumato.runs.preparation import PreparedRun
from sfumato.training.enough import before_training, is_protected, most_views

# Training samples in total, repeats included. docs/benchmarks.md, "Time to quality": at 32 px,
# 43,000 to 51,000 bring the kernel distance of the preset to 3 or 4, where the baselines end at 8;
# after a quarter of that it is at 7 (1.8 minutes).
ENOUGH, TOO_FEW = 45_000, 12_000
# Steps of an autoencoder at batch size 16. Two and a half minutes at 64 px end at 19 dB, and seven
# at 21.8 dB with reds still brown (docs/ablations.md, which does not say the steps); seven minutes
# have this many steps at 0.2 s a step.
AUTOENCODER_STEPS = 2_000
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


def check_plan(prepared: PreparedRun, stages: Sequence[CostEstimate]) -> tuple[list[Finding], str]:
    """Return the problems of a plan on this machine, and what `views_line` says of it."""
    images, from_scratch = len(prepared.dataset.training), not prepared.run.has_base
    protected = is_protected(prepared.run.data.augment, prepared.model.network)
    known: dict[str, Any] = {
        "images": images,
        "from_scratch": from_scratch,
        "protected": protected,
        "stops": prepared.run.stop != "never",
    }
    problems = findings(stages, machine=Machine.here(), **known)
    return problems, views_line(stages[-1], **known)


def findings(
    stages: Sequence[CostEstimate],
    *,
    images: int,
    machine: Machine,
    from_scratch: bool = True,
    protected: bool = False,
    stops: bool = False,
) -> list[Finding]:
    """Return the problems of a plan, the most serious first; [] if it is long enough and fits.

    Args:
        stages: the cost estimates, the diffusion model's last.
        images: number of training images.
        from_scratch: whether the model begins with random weights; how long a fine-tuning takes is
            said by its comparisons with the base.
        protected: whether augmentation and dropout hold off memorizing.
        stops: whether the run ends by itself when it overfits.
    """
    if not from_scratch:
        return _resource_findings(stages, machine)
    *autoencoders, model = stages
    views = before_training(images, model.epochs, protected=protected, stops=stops)
    return [
        *_resource_findings(stages, machine),
        *(finding for stage in autoencoders for finding in _autoencoder_findings(stage)),
        *_length_findings(model, images, most_views(images, protected=protected)),
        *([Finding(what=views.sentence, change=views.change)] if views.change else []),
    ]


def views_line(
    model: CostEstimate, *, images: int, from_scratch: bool, protected: bool, stops: bool = False
) -> str:
    """Return what the number of views of each image says; "" where `findings` says it.

    For arguments, see `findings`.
    """
    views = before_training(images, model.epochs, protected=protected, stops=stops)
    return f"views: {views.sentence}" if from_scratch and not views.change else ""


def views_before_planning(run: Run, images: int, *, network: nn.Module) -> str:
    """Return what the number of views says of a set whose training has not been measured.

    Where only time limits the training, as many samples are assumed as are enough.

    Args:
        images: of the set, those that the source holds out aside.
    """
    training = images - expected_holdout(images, run.data.holdout)
    if run.data.half != "off":
        training = -(-training // 2)
    if training < 1:
        return ""
    batch = run.batch_size
    used = run.budget.progress(steps=1, samples=batch, epochs=batch / training, seconds=0.0)
    samples = batch / used if used else ENOUGH
    views = before_training(
        training,
        samples / training,
        protected=is_protected(run.data.augment, network),
        by="this budget" if used else f"{ENOUGH:,} training samples (about enough at 32 px)",
    )
    return "; ".join(filter(None, (views.sentence, views.change))) + "."


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


def _length_findings(model: CostEstimate, images: int, views: float) -> list[Finding]:
    """Return whether the model is trained for too short; a set that is memorized after `views`
    views of each image is not seen more often.
    """
    enough = min(ENOUGH, math.floor(views * images)) if math.isfinite(views) else ENOUGH
    if model.images >= enough:
        return []
    batch = model.images / model.steps
    verdict = (
        "too short: rough shapes and colours at best"
        if model.images < TOO_FEW / ENOUGH * enough
        else "short: samples would still get better"
    )
    why = (
        f"about {ENOUGH:,} are enough at 32 px"
        if enough == ENOUGH
        else f"{images} images can be seen {views:.0f} times, {enough:,} samples, before they are "
        "memorized"
    )
    return [
        Finding(
            what=f"{verdict}: {model.images:,} training samples in total; {why}",
            change=f"{_longer('budget', model, math.ceil(enough / batch))}, or lower "
            "data.resolution, or use a smaller network",
        )
    ]


def _longer(key: str, stage: CostEstimate, steps: int) -> str:
    """Return the setting that gives a stage `steps` steps, and how long they take on this machine."""
    seconds = steps * stage.seconds / stage.steps
    return f"set {key}.minutes={max(1, math.ceil(seconds / 60))} ({steps:,} steps, {duration(seconds)} on this machine)"
