"""The cost of a run, estimated from a few of its own steps."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from sfumato.data import Dataset
from sfumato.observability.metrics_file import peak_gib
from sfumato.observability.progress import duration
from sfumato.recipes.autoencoder_stage import TrainedAutoencoder
from sfumato.runs.preparation import PreparedRun
from sfumato.runs.trainer_assembly import diffusion_trainer
from sfumato.storage.run_directory import RunDirectory
from sfumato.training import PreviewConfig, Trainer, TrainingConfig, ValidationConfig
from sfumato.training.autotune import precision_of
from sfumato.training.config import Cadence

# cost of a training step in forward passes: one forward pass, and a backward pass of twice the work
STEP_COST = 3


@dataclass(frozen=True, kw_only=True)
class CostEstimate:
    """The estimated cost of a stage, measured on this machine under its current load.

    Attributes:
        stage: name of the stage, `autoencoder` or `diffusion model`.
        step_s: seconds of a training step; a possible gain from compiling is not included.
        steps, seconds, epochs: of the whole run, previews and validation included, checkpoints
            excluded.
        memory_gib: peak memory of the process so far, on the training device; training stays close
            to it.
        disk_gib: largest size of all checkpoints together.
        images: training samples in total, repeats included.
        looks_s: seconds of previews and validation, a part of `seconds`, estimated from the step.
        encoding_s: seconds of encoding the images after this stage, if it trains an autoencoder.
        trial_s: seconds that this estimate took.
        precision: precision inside the network.
    """

    stage: str
    step_s: float
    steps: int
    seconds: float
    epochs: float
    memory_gib: float
    disk_gib: float
    images: int = 0
    looks_s: float = 0.0
    encoding_s: float = 0.0
    trial_s: float = 0.0
    precision: str = "float32"

    def lines(self) -> list[str]:
        """Return the estimate as lines of text."""
        evaluation = (
            f", including {duration(self.looks_s)} for previews and validation"
            if self.looks_s >= 1
            else ""
        )
        return [
            f"predicted: {self.stage}, {self.steps} steps of {self.step_s:.3g} s, "
            f"{duration(self.seconds)} total{evaluation}; "
            f"each image is seen {self.epochs:.1f} times",
            f"predicted: {self.stage}, {self.memory_gib:.1f} GiB of memory, {self.disk_gib:.2f} "
            "GiB of disk",
        ]


def estimate_cost(prepared: PreparedRun) -> list[CostEstimate]:
    """Estimate the cost of each stage from a few real steps in a temporary folder."""
    run, dataset = prepared.run, prepared.dataset
    estimates = []
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        for stage, trainer in run.autoencoder.trial_trainers(
            dataset, Path(folder) / "autoencoder"
        ).items():
            config = cast(TrainedAutoencoder, run.autoencoder)  # no other is trained
            estimate = _estimate_stage(stage, trainer, config, begun)
            estimates.append(
                replace(estimate, encoding_s=_encoding_s(config, dataset, estimate.step_s))
            )
        begun = time.perf_counter()
        trainer = trial_trainer(prepared, Path(folder) / "run")
        estimates.append(_estimate_stage("diffusion model", trainer, run, begun))
    return estimates


def _encoding_s(config: TrainedAutoencoder, dataset: Dataset, step_s: float) -> float:
    """Estimate the seconds of encoding: half a forward pass for each copy of each image."""
    copies = 1 if dataset.config.augment.is_off else config.augmented_copies
    return 0.5 * step_s * copies * len(dataset.training) / (STEP_COST * config.batch_size)


def _estimate_stage(
    stage: str, trainer: Trainer, config: TrainingConfig, begun: float
) -> CostEstimate:
    step_s = trainer.measure_step()
    size, batch = len(trainer.dataset.training), config.batch_size
    preview, validation = (
        step_s * count / (STEP_COST * batch) for count in trainer.task.forward_images(config)
    )
    steps, evaluation_s = config.budget.steps_of(step_s, batch_size=batch, images=size), 0.0
    # a fixed point: previews and validation leave time for fewer steps, and fewer steps need fewer
    # of them
    for _ in range(20):
        evaluation_s = _evaluation_s(
            config, steps, steps * step_s + evaluation_s, preview, validation
        )
        steps = config.budget.steps_of(step_s + evaluation_s / steps, batch_size=batch, images=size)
    return CostEstimate(
        stage=stage,
        step_s=step_s,
        steps=steps,
        seconds=steps * step_s + evaluation_s,
        epochs=steps * batch / size,
        memory_gib=peak_gib(trainer.device),
        disk_gib=trainer.saver.disk_bytes() / 2**30,
        images=steps * batch,
        looks_s=evaluation_s,
        trial_s=time.perf_counter() - begun,
        precision=precision_of(trainer.config, trainer.state.counters),
    )


def _evaluation_s(
    config: TrainingConfig, steps: int, seconds: float, preview_s: float, validation_s: float
) -> float:
    """Return the seconds that previews and validations take.

    There is one more preview than validations, before the first step.
    """
    previews = 2 + count_due(config.preview, steps, seconds, preview_s)
    return (
        previews * preview_s
        + (1 + count_due(config.validation, steps, seconds, validation_s)) * validation_s
    )


def count_due(cadence: Cadence, steps: int, seconds: float, cost_s: float) -> int:
    """Return how often an action is due before the last step of a training.

    The training has `steps` steps and takes `seconds`.
    """
    by_steps = 0 if cadence.every_steps is None else (steps - 1) // cadence.every_steps
    first_s, then_s = (cadence.wait_s(first=first, cost_s=cost_s) for first in (True, False))
    return max(by_steps, 0 if seconds <= first_s else 1 + int((seconds - first_s) / then_s))


def trial_trainer(prepared: PreparedRun, folder: Path) -> Trainer:
    """Build the trainer of a run's diffusion model in a temporary folder, to measure its steps.

    The latents, if the run has any, are zeros. Validation and previews are as small as possible,
    since they take long to prepare.
    """
    kept = prepared.run.preservation
    run = replace(
        prepared.run,
        validation=ValidationConfig(samples=1, bins=1),
        preview=PreviewConfig(num=1),
        preservation=None if kept is None else replace(kept, num=min(1, kept.num)),
    )
    directory = RunDirectory.create(folder)
    autoencoder, dataset = run.autoencoder.placeholder(prepared.dataset, pixels=run.needs_images)
    return diffusion_trainer(
        run,
        model=prepared.trainable_model(),
        autoencoder=autoencoder,
        dataset=dataset,
        directory=directory,
        info=prepared.info,
        saved_config={},
        prior=prepared.prior,
    )
