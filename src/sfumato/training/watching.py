"""What is looked at while a model trains: its error on held-out pictures, and pictures of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sfumato import randomness
from sfumato.data import Dataset, to_float
from sfumato.diffusion import Schedule
from sfumato.observability.pictures import grid_image, save_png
from sfumato.pipeline import Model, Pipeline, SamplingConfig
from sfumato.sampling import Progress
from sfumato.training.config import TrainingConfig
from sfumato.training.run_directory import RunDirectory
from sfumato.training.validation import Errors, Triples, generalization_gap, make_triples, measure, summarize


class Validator:
    """Fixed triples of held-out pictures, and as many of training pictures with the same noises and levels."""

    def __init__(self, config: TrainingConfig, dataset: Dataset, schedule: Schedule, device: torch.device) -> None:
        self.batch_size, self.device = config.batch_size, device
        self._sets: list[tuple[Triples, dict[str, torch.Tensor]]] = []
        for part in (dataset.holdout, dataset.training):
            positions = dataset.usual(part) if len(dataset.usual(part)) else part[:1]
            order = randomness.permutation(config.seed, "validation", index=0, size=len(positions))
            chosen = positions[order[[i % len(order) for i in range(config.validation.samples)]]]
            images = to_float(dataset.images(chosen)[0])
            triples = make_triples(images.to(device), schedule, seed=config.seed, bins=config.validation.bins)
            self._sets.append((triples, {name: value.to(device) for name, value in dataset.context(chosen).items()}))
        self.second_moment = float(self._sets[0][0].x0.double().square().mean())

    def figures(self, model: Model, average: Model) -> dict[str, Any]:
        """`validation/ema/*`, `validation/raw/*` on held-out pictures, `validation/gap/*` against training pictures (averaged weights)."""
        triples = self._sets[0][0]
        averaged, raw = self._errors(average, 0), self._errors(model, 0)
        gap = generalization_gap(averaged, self._errors(average, 1), triples)
        return {
            **{f"validation/ema/{key}": value for key, value in summarize(averaged, triples, self.second_moment).items()},
            **{f"validation/raw/{key}": value for key, value in summarize(raw, triples, self.second_moment).items()},
            **{f"validation/gap/{key}": value for key, value in gap.items()},
        }

    def _errors(self, model: Model, which: int) -> Errors:
        triples, context = self._sets[which]
        model.eval()
        with torch.no_grad():
            condition = model.conditioner(context, len(triples.x0))
        return measure(model.denoiser(), triples, condition, batch_size=self.batch_size)


class Previewer:
    """Grids of samples with the same noise and categories every time, and one grid of real pictures to compare with."""

    def __init__(self, config: TrainingConfig, dataset: Dataset, sampling: SamplingConfig, directory: RunDirectory) -> None:
        self.num, self.seed, self.sampling, self.directory = config.preview.num, config.seed, sampling, directory
        self.categories, self.image_shape = dataset.categories, dataset.image_shape
        self.asked = list(dataset.categories[: self.num]) or None
        self.columns = len(self.asked) if self.asked and 2 <= len(self.asked) <= 12 else None
        self._real(dataset)

    def _real(self, dataset: Dataset) -> None:
        path = self.directory.samples / "real.png"
        if path.exists():
            return
        training = dataset.usual(dataset.training)
        labels = dataset.labels[torch.from_numpy(training)]
        numbers = range(len(self.asked)) if self.asked else [-1]
        pools = [pool for number in numbers if len(pool := training[(labels == number).numpy()])] or [training]
        chosen = [pools[i % len(pools)][i // len(pools) % len(pools[i % len(pools)])] for i in range(self.num)]
        images = (to_float(dataset.images(chosen)[0]) + 1) / 2
        save_png(grid_image(images, columns=self.columns), path)

    def show(self, average: Model, step: int, on_step: Callable[[Progress], None]) -> None:
        """Write samples/step-.../grid.png and samples.json."""
        pipeline = Pipeline(model=average, sampling=self.sampling, categories=self.categories, image_shape=self.image_shape)
        images = pipeline.sample(self.num, category=self.asked, seed=self.seed, on_step=on_step)
        folder = self.directory.samples / f"step-{step:09d}"
        settings = {
            "step": step,
            "seed": self.seed,
            "categories": self.asked,
            "weights": "ema",
            "guidance": self.sampling.guidance,
        }
        save_png(grid_image(images, columns=self.columns), folder / "grid.png", settings)
        self.directory.write_json(f"samples/{folder.name}/samples.json", settings)
