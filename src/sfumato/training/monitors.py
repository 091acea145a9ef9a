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
from sfumato.condition import ContextValues, reorder, to_device
from sfumato.conditioners import CompositeConditioner, ConditioningInfo
from sfumato.contexts import CONTEXTS, enumerate_values
from sfumato.data import Dataset, to_float
from sfumato.diffusion import Schedule
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
    make_triples,
    measure,
    summarize,
)
from sfumato.training.loss_mask import loss_weights


class Validator:
    """Measures errors on fixed triples of held-out images.

    There are as many triples of training images, with the same noises and levels. Errors count
    where the masks of the loss are white.
    """

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
        self._sets: list[tuple[Triples, ContextValues]] = []
        for part in (dataset.holdout, dataset.training):
            positions = _usual_or_first(dataset, part)
            order = randomness.permutation(config.seed, "validation", index=0, size=len(positions))
            pixels, _, chosen = dataset.images(
                positions[order[[i % len(order) for i in range(config.validation.samples)]]]
            )
            images = to_float(pixels).to(device)
            x0 = latents(autoencoder, images, seed=config.seed, batch_size=self.batch_size)
            context = to_device(dataset.context(chosen), device)
            triples = replace(
                make_triples(x0, schedule, seed=config.seed, bins=config.validation.bins),
                weights=loss_weights(context, slice(None), like=x0),
            )
            self._sets.append(
                (triples, conditioner.training_context(images, context, seed=config.seed, first=0))
            )
        self.second_moment = self._sets[0][0].second_moment()

    def figures(self, model: Model, average: Model) -> dict[str, Any]:
        """Return the figures of a validation, as metrics.jsonl keeps them.

        `validation/ema/*` and `validation/raw/*` are errors on held-out images, in float32 except
        for raw weights that are trained in float8. The averaged weights also have
        `validation/gap/*`, their error minus that on training images, and
        `validation/adherence/NAME/*`, their error under another image's context minus that under
        its own: above zero as soon as the context steers.
        """
        triples, context = self._sets[0]
        averaged, raw = self._errors(average, 0), self._errors(model, 0)
        gap = difference(averaged, self._errors(average, 1), triples)
        return {
            **{
                f"validation/ema/{key}": value
                for key, value in summarize(averaged, triples, self.second_moment).items()
            },
            **{
                f"validation/raw/{key}": value
                for key, value in summarize(raw, triples, self.second_moment).items()
            },
            **{f"validation/gap/{key}": value for key, value in gap.items()},
            **{
                f"validation/adherence/{name}/{key}": value
                for name in average.conditioner.user_inputs
                if name in context
                for key, value in difference(
                    self._errors(average, 0, shuffled=name), averaged, triples
                ).items()
            },
        }

    def error(self, model: Model) -> dict[str, Any]:
        """Return the errors of one model on held-out images."""
        return summarize(self.errors(model), self.triples, self.second_moment)

    @property
    def triples(self) -> Triples:
        """The triples of held-out images."""
        return self._sets[0][0]

    def errors(self, model: Model) -> Errors:
        """Return the errors of one model on the triples of held-out images."""
        return self._errors(model, 0)

    def _errors(self, model: Model, which: int, *, shuffled: str | None = None) -> Errors:
        triples, context = self._sets[which]
        if shuffled is not None:
            count = len(triples.x0)
            context = {
                **context,
                **reorder({shuffled: context[shuffled]}, [(i + 1) % count for i in range(count)]),
            }
        model.eval()
        with torch.no_grad():
            condition = model.conditioner(context, len(triples.x0))
        return measure(model.denoiser(), triples, condition, batch_size=self.batch_size)


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
        if not path.exists():
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
