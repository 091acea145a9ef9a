"""What a run will cost, predicted from a few of its own steps."""

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
from sfumato.runs.assembly import diffusion_trainer
from sfumato.runs.preparation import PreparedRun
from sfumato.storage.run_directory import RunDirectory
from sfumato.training import PreviewConfig, Trainer, TrainingConfig, ValidationConfig
from sfumato.training.autotune import precision_of
from sfumato.training.config import Cadence

# forward passes that a step of training costs: one forward, and one backward of twice the work
PASSES = 3


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The predicted cost of a stage, measured on this machine, as busy as it is now.

    Attributes:
        stage: what is trained.
        step_s: seconds of a training step; what compiling may gain is left out.
        steps, seconds, epochs: of the whole run, previews and validation included, checkpoints
            aside.
        memory_gib: most that the process has held so far, on the device that it trains on; training
            stays close to it.
        disk_gib: checkpoints at their most.
        images: that are trained on, each as often as it is seen.
        looks_s: of `seconds`, what previews and validation take, estimated from the step.
        encoding_s: what encoding the images takes after this stage, if it is an autoencoder's.
        trial_s: what this prediction took.
        precision: that the network computes in.
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
        """Return the prediction as lines of text."""
        looks = (
            f", {duration(self.looks_s)} of it for previews and validation"
            if self.looks_s >= 1
            else ""
        )
        return [
            f"predicted: {self.stage}, {self.steps} steps of {self.step_s:.3g} s, "
            f"{duration(self.seconds)} in all{looks}; "
            f"each image is seen {self.epochs:.1f} times",
            f"predicted: {self.stage}, {self.memory_gib:.1f} GiB of memory, {self.disk_gib:.2f} "
            "GiB of disk",
        ]


def predict(prepared: PreparedRun) -> list[Prediction]:
    """Predict the cost of each stage from a few real steps in a scratch folder."""
    run, dataset = prepared.run, prepared.dataset
    found = []
    with tempfile.TemporaryDirectory() as place:
        begun = time.perf_counter()
        for stage, trainer in run.autoencoder.trial_trainers(
            dataset, Path(place) / "autoencoder"
        ).items():
            own = cast(TrainedAutoencoder, run.autoencoder)  # no other is trained
            prediction = _predicted(stage, trainer, own, begun)
            found.append(
                replace(prediction, encoding_s=_encoding_s(own, dataset, prediction.step_s))
            )
        begun = time.perf_counter()
        found.append(
            _predicted("diffusion model", trial_trainer(prepared, Path(place) / "run"), run, begun)
        )
    return found


def _encoding_s(own: TrainedAutoencoder, dataset: Dataset, step_s: float) -> float:
    """Estimate the seconds of encoding: half a forward pass for each variant of each image."""
    variants = 1 if dataset.config.augment.is_off else own.augmented_copies
    return 0.5 * step_s * variants * len(dataset.training) / (PASSES * own.batch_size)


def _predicted(stage: str, trainer: Trainer, config: TrainingConfig, begun: float) -> Prediction:
    step_s = trainer.measure_step()
    size, batch = len(trainer.dataset.training), config.batch_size
    preview, validation = (
        step_s * passes / (PASSES * batch) for passes in trainer.task.forward_images(config)
    )
    steps, looks_s = config.budget.steps_of(step_s, batch_size=batch, images=size), 0.0
    # what is looked at takes time from the steps, and the fewer steps, the less is looked at
    for _ in range(20):
        looks_s = _looks_s(config, steps, steps * step_s + looks_s, preview, validation)
        steps = config.budget.steps_of(step_s + looks_s / steps, batch_size=batch, images=size)
    return Prediction(
        stage=stage,
        step_s=step_s,
        steps=steps,
        seconds=steps * step_s + looks_s,
        epochs=steps * batch / size,
        memory_gib=peak_gib(trainer.device),
        disk_gib=trainer.disk_bytes() / 2**30,
        images=steps * batch,
        looks_s=looks_s,
        trial_s=time.perf_counter() - begun,
        precision=precision_of(trainer.config, trainer.state.counters),
    )


def _looks_s(
    config: TrainingConfig, steps: int, seconds: float, preview_s: float, validation_s: float
) -> float:
    """Return the seconds that previews and validations take.

    There is one more preview than validations, before the first step.
    """
    previews = 2 + times(config.preview, steps, seconds, preview_s)
    return (
        previews * preview_s
        + (1 + times(config.validation, steps, seconds, validation_s)) * validation_s
    )


def times(cadence: Cadence, steps: int, seconds: float, cost_s: float) -> int:
    """Return how often something comes due before the last step of a training.

    The training has `steps` steps and takes `seconds`.
    """
    by_steps = 0 if cadence.every_steps is None else (steps - 1) // cadence.every_steps
    first_s, then_s = (cadence.wait_s(first=first, cost_s=cost_s) for first in (True, False))
    return max(by_steps, 0 if seconds <= first_s else 1 + int((seconds - first_s) / then_s))


def trial_trainer(prepared: PreparedRun, place: Path) -> Trainer:
    """Build the trainer of a run's diffusion model in a scratch folder, for a trial.

    The latents, if the run has any, are zeros.

    It validates and previews as little as possible, since that takes long to prepare.
    """
    run = replace(
        prepared.run, validation=ValidationConfig(samples=1, bins=1), preview=PreviewConfig(num=1)
    )
    directory = RunDirectory.create(place)
    autoencoder, dataset = run.autoencoder.placeholder(prepared.dataset, pixels=run.needs_images)
    return diffusion_trainer(
        run,
        model=prepared.trainable_model(),
        autoencoder=autoencoder,
        dataset=dataset,
        directory=directory,
        info=prepared.info,
        saved_config={},
    )
