"""What a run will take, from a few of its own steps."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from sfumato.conditioners import Facts
from sfumato.data import Dataset
from sfumato.observability.metrics import peak_gib
from sfumato.observability.progress import duration
from sfumato.pipeline import Model
from sfumato.recipes.assembly import diffusion_trainer, with_auxiliary
from sfumato.recipes.run import Run
from sfumato.training import Trainer
from sfumato.training.run_directory import RunDirectory

MANY_VIEWS = 200  # of each picture, where small sets begin to be learned by heart


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Measured on this machine, as busy as it is now.

    Attributes:
        stage: what is trained.
        step_s: seconds of a training step; what compiling may gain is left out.
        steps, seconds, epochs: of the whole run, previews, validation and checkpoints aside.
        memory_gib: most that the process has held so far, on the device that it trains on; training stays close to it.
        disk_gib: checkpoints at their most.
    """

    stage: str
    step_s: float
    steps: int
    seconds: float
    epochs: float
    memory_gib: float
    disk_gib: float

    def lines(self, pictures: int) -> list[str]:
        """For a person."""
        said = [
            f"predicted: {self.stage}, {self.steps} steps of {self.step_s:.3g} s, {duration(self.seconds)} in all; "
            f"each picture seen {self.epochs:.1f} times",
            f"predicted: {self.stage}, {self.memory_gib:.1f} GiB of memory, {self.disk_gib:.2f} GiB of disk",
        ]
        if self.epochs > MANY_VIEWS and pictures < 5000:
            said.append(f"{self.epochs:.0f} views of each picture: watch the gap to held-out pictures, and stop when it grows")
        return said


def predict(run: Run, model: Model, dataset: Dataset, facts: Facts) -> list[Prediction]:
    """Take a few real steps of each stage in a scratch folder; `model` is used up."""
    with tempfile.TemporaryDirectory() as place:
        trainers = run.autoencoder.rehearsals(dataset, Path(place) / "autoencoder")
        trainers["diffusion model"] = rehearsal(run, model, dataset, facts, Path(place) / "run")
        return [_predicted(stage, trainer) for stage, trainer in trainers.items()]


def _predicted(stage: str, trainer: Trainer) -> Prediction:
    step_s = trainer.rehearse()
    size, batch = len(trainer.dataset.training), trainer.config.batch_size
    steps = trainer.config.budget.steps_of(step_s, batch_size=batch, pictures=size)
    return Prediction(
        stage=stage,
        step_s=step_s,
        steps=steps,
        seconds=steps * step_s,
        epochs=steps * batch / size,
        memory_gib=peak_gib(trainer.device),
        disk_gib=trainer.disk_bytes() / 2**30,
    )


def rehearsal(run: Run, model: Model, dataset: Dataset, facts: Facts, place: Path) -> Trainer:
    """A trainer of a run's diffusion model in a scratch folder, with an untrained autoencoder where the run has one."""
    directory = RunDirectory.create(place)
    autoencoder, dataset = run.autoencoder.untrained(dataset, pixels=run.sees_pictures)
    model = with_auxiliary(run, model)
    return diffusion_trainer(
        run, model=model, autoencoder=autoencoder, dataset=dataset, directory=directory, facts=facts, pinned={}
    )
