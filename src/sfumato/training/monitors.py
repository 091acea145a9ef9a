"""Validation and previews during training: the error on held-out images, and samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato import randomness
from sfumato.autoencoders import Autoencoder
from sfumato.condition import NO_CONDITION, to_device
from sfumato.conditioners import CompositeConditioner, ConditioningInfo
from sfumato.contexts import CONTEXTS, enumerate_values
from sfumato.data import Dataset, to_float
from sfumato.diffusion import EmpiricalDenoiser, LinearDenoiser, Schedule
from sfumato.distributed import current, seconds
from sfumato.errors import DataError
from sfumato.generation.diffusion_model import Model, SamplingConfig
from sfumato.generation.pipeline import Pipeline
from sfumato.generation.request import ResolvedRequest
from sfumato.observability.images import grid_image, save_png
from sfumato.sampling import StepInfo
from sfumato.storage.run_directory import RunDirectory
from sfumato.training.config import TrainingConfig
from sfumato.training.denoising_error import (
    Errors,
    Triples,
    difference,
    measure,
    summarize,
)
from sfumato.training.evidence import error_ratio
from sfumato.training.loss_mask import loss_weights
from sfumato.training.probe import Probe, TripleSet

# of a look: ranges of noise, and the fewest training images beside as many as are held out
LOOK_BINS, FEWEST_SEEN, MAX_LOOK_IMAGES = 5, 25, 10_000
TIMED = 6  # images by which the time of a prediction is measured
MAX_FILTERED = 1000  # training images that the linear denoiser is estimated from


class Validator:
    """Measures errors on held-out images and on training images, each at every level.

    Both are at most one image of each group of near-duplicates, spread over the categories.
    Errors count where the masks of the loss are white. A look meets images at fewer levels than a
    validation, since it comes more often.

    Attributes:
        look_images: the most held-out images of a look, and training images.
    """

    look_images = MAX_LOOK_IMAGES

    def __init__(
        self,
        *,
        config: TrainingConfig,
        dataset: Dataset,
        schedule: Schedule,
        conditioner: CompositeConditioner,
        autoencoder: Autoencoder,
        device: torch.device,
    ) -> None:
        """Make the triples.

        Raises:
            DataError: if nothing is held out.
        """
        if not len(dataset.holdout):
            raise DataError(
                f"nothing is held out of {len(dataset.entries)} images, so that no error on unseen "
                "images can be measured",
                where="data",
                hint="train a new run on more images, or with data.holdout above 0",
            )
        self.batch_size = config.effective_micro_batch
        bins, most = config.validation.bins, config.validation.samples // config.validation.bins

        def latents_of(positions: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64], Tensor]:
            pixels, _, chosen = dataset.images(positions)
            images = to_float(pixels).to(device)
            x0 = latents(autoencoder, images, seed=config.seed, batch_size=self.batch_size)
            return images, chosen, x0

        self._sets, self._look_sets = list[TripleSet](), list[TripleSet]()
        for part in (dataset.holdout, dataset.training):
            images, chosen, x0 = latents_of(
                spread(dataset, part, max(1, most), seed=config.seed, purpose="validation")
            )
            context = to_device(dataset.context(chosen), device)
            probe = Probe(
                x0=x0,
                weights=loss_weights(context, slice(None), like=x0),
                context=conditioner.training_context(images, context, seed=config.seed, first=0),
            )
            self._sets.append(
                probe.triples(len(x0), schedule=schedule, seed=config.seed, bins=bins, most=most)
            )
            count = max(FEWEST_SEEN, len(self._sets[0].triples.x0))
            few = min(bins, LOOK_BINS)
            self._look_sets.append(
                probe.triples(count, schedule=schedule, seed=config.seed, bins=few, most=most)
            )
        learned = spread(
            dataset, dataset.training, MAX_FILTERED, seed=config.seed, purpose="filter"
        )
        x0, held_out = latents_of(learned)[2].cpu(), self._sets[0].triples
        self._baselines = [
            measure(
                simple,
                replace(held_out, x0=held_out.x0.cpu()),
                NO_CONDITION,
                batch_size=500,
            )
            for simple in (
                LinearDenoiser.of_mean(x0),
                LinearDenoiser.of(x0),
                EmpiricalDenoiser(x0),
            )
        ]

    def figures(self, model: Model, average: Model) -> dict[str, Any]:
        """Return the figures of a validation, as metrics.jsonl keeps them.

        `validation/ema/*` and `validation/raw/*` are errors on held-out images, in float32 except
        for raw weights that are trained in float8. The averaged weights also have
        `validation/ratio/*`, their error on held-out images over that on training images, with its
        95 % interval, and `validation/adherence/NAME/*`, their error under another image's context
        minus that under its own: above zero as soon as the context steers.
        """
        held_out, (averaged, seen) = self._sets[0], self.errors(average)
        ratio = error_ratio(averaged.by_image(), seen.by_image(), level=0.95)
        return {
            **{f"validation/ema/{key}": value for key, value in self._summary(averaged).items()},
            **{f"validation/raw/{key}": value for key, value in self.error(model).items()},
            **{f"validation/ratio/{key}": value for key, value in ratio._asdict().items()},
            **{
                f"validation/adherence/{name}/{key}": value
                for name in average.conditioner.user_inputs
                if name in held_out.context
                for key, value in difference(
                    self._errors(average, held_out.shuffled(name)), averaged, held_out.triples
                ).items()
            },
        }

    def error(self, model: Model) -> dict[str, Any]:
        """Return the errors of one model on held-out images."""
        return self._summary(self._errors(model, self._sets[0]))

    def _summary(self, errors: Errors) -> dict[str, Any]:
        return summarize(errors, self._sets[0].triples, *self._baselines)

    @property
    def look_triples(self) -> Triples:
        """The triples of held-out images of a look."""
        return self._look_sets[0].first(self.look_images).triples

    def errors(self, model: Model) -> tuple[Errors, Errors]:
        """Return the errors of a model on held-out and on training images, as a validation has them."""
        held_out, learned = self._sets
        return self._errors(model, held_out), self._errors(model, learned)

    def look_errors(self, model: Model) -> tuple[Errors, Errors]:
        """Return the errors of a model on the held-out and on the training images of a look."""
        held_out, learned = (each.first(self.look_images) for each in self._look_sets)
        return self._errors(model, held_out), self._errors(model, learned)

    def prediction_s(self, model: Model) -> float:
        """Return about how many seconds a prediction of the network takes."""
        few = self._look_sets[1].first(TIMED)
        self._errors(model, few)
        begun = seconds()
        self._errors(model, few)
        return (seconds() - begun) / len(few.triples)

    def _errors(self, model: Model, chosen: TripleSet) -> Errors:
        model.eval()
        with torch.no_grad():
            condition = model.conditioner(chosen.context, len(chosen.triples.x0))
        return measure(model.denoiser(), chosen.triples, condition, batch_size=self.batch_size)


def spread(
    dataset: Dataset, part: NDArray[np.int64], most: int, *, seed: int, purpose: str
) -> NDArray[np.int64]:
    """Choose at most `most` images of a part of a dataset, spread over its categories.

    They have the usual shape, and no two are near-duplicates.
    """
    positions = _usual_or_first(dataset, part)
    positions = positions[randomness.permutation(seed, purpose, index=0, size=len(positions))]
    _, firsts = np.unique(dataset.clusters[positions], return_index=True)
    positions = positions[np.sort(firsts)]
    labels = dataset.labels[torch.from_numpy(positions)].numpy()
    turn = np.zeros(len(positions), np.int64)  # of each image among those of its category
    for label in np.unique(labels):
        turn[labels == label] = np.arange((labels == label).sum())
    return positions[np.argsort(turn, kind="stable")][:most]


def _usual_or_first(dataset: Dataset, part: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the positions whose images have the usual shape, or the first one if none has."""
    usual = dataset.with_common_shape(part)
    return usual if len(usual) else part[:1]


@torch.no_grad()
def latents(autoencoder: Autoencoder, images: Tensor, *, seed: int, batch_size: int) -> Tensor:
    """Draw one latent for each image (N, C, H, W), the same at every call."""

    def draw_batch(first: int) -> Tensor:
        moments = autoencoder.moments(images[first : first + batch_size])
        return autoencoder.sample_posterior(
            moments,
            lambda shape: randomness.normal(seed, "validation/latent", first=first, shape=shape),
        )

    return torch.cat([draw_batch(first) for first in range(0, len(images), batch_size)])


class Previewer:
    """Draws grids of samples with the same noise and context every time.

    It also draws one grid of the real images that the context belongs to.
    """

    def __init__(
        self,
        *,
        config: TrainingConfig,
        dataset: Dataset,
        sampling: SamplingConfig,
        conditioner: CompositeConditioner,
        autoencoder: Autoencoder,
        directory: RunDirectory,
        info: ConditioningInfo,
    ) -> None:
        self.seed, self.sampling, self.directory, self.info = (
            config.seed,
            sampling,
            directory,
            info,
        )
        self.autoencoder = autoencoder
        self.image_shape = dataset.image_shape
        reads = conditioner.user_inputs
        enumerable = enumerate_values(reads, config.preview.num, info) is not None
        chosen = (
            _of_each_category(dataset, config.preview.num)
            if enumerable
            else _held_out(dataset, config)
        )
        pixels, _, chosen = dataset.images(chosen)
        images = to_float(pixels)
        context = conditioner.training_context(
            images, dataset.context(chosen), seed=config.seed, first=0
        )
        self.context = {name: value for name, value in context.items() if name in reads}
        words = {name: CONTEXTS[name].words(values, info) for name, values in self.context.items()}
        self.num, self.words = (
            len(chosen),
            {name: texts for name, texts in words.items() if texts is not None},
        )
        categories = len(dataset.categories)
        self.columns = categories if reads and enumerable and 2 <= categories <= 12 else None
        path = directory.samples / "real.png"
        if directory.writes and not path.exists():
            save_png(grid_image((images + 1) / 2, columns=self.columns, alpha=info.alpha), path)

    def show(self, average: Model, step: int, on_step: Callable[[StepInfo], None]) -> None:
        """Write samples/step-.../grid.png and samples.json."""
        pipeline = Pipeline(
            model=average,
            autoencoder=self.autoencoder,
            sampling=self.sampling,
            info=self.info,
            image_shape=self.image_shape,
        )
        request = ResolvedRequest.of(self.context, self.image_shape, self.num)
        images = pipeline.sample_request(request, seed=self.seed, on_step=on_step)
        current().on_first(lambda: self._write(images, step))

    def _write(self, images: Tensor, step: int) -> None:
        folder = self.directory.samples / f"step-{step:09d}"
        settings = {
            "step": step,
            "seed": self.seed,
            **self.words,
            "weights": "ema",
            "guidance": self.sampling.guidance,
        }
        sheet = grid_image(images, columns=self.columns, alpha=self.info.alpha)
        save_png(
            sheet,
            folder / "grid.png",
            {name: value for name, value in settings.items() if name not in self.words},
        )
        self.directory.write_json(f"samples/{folder.name}/samples.json", settings)


def _of_each_category(dataset: Dataset, num: int) -> NDArray[np.int64]:
    """Choose training images, cycling through the categories."""
    training = _usual_or_first(dataset, dataset.training)
    labels = dataset.labels[torch.from_numpy(training)]
    numbers = range(min(num, len(dataset.categories))) or [-1]
    pools = [pool for number in numbers if len(pool := training[(labels == number).numpy()])] or [
        training
    ]
    return np.array(
        [pools[i % len(pools)][i // len(pools) % len(pools[i % len(pools)])] for i in range(num)]
    )


def _held_out(dataset: Dataset, config: TrainingConfig) -> NDArray[np.int64]:
    """Choose held-out images, whose context is unseen; training images if none are held out."""
    held_out = dataset.with_common_shape(dataset.holdout)
    positions = held_out if len(held_out) else _usual_or_first(dataset, dataset.training)
    order = randomness.permutation(config.seed, "preview", index=0, size=len(positions))
    return positions[order[[i % len(order) for i in range(config.preview.num)]]]
