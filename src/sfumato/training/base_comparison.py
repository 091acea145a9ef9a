"""A fine-tuned model beside its base: what was gained on new images, and what was lost of the rest."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato.autoencoders import Autoencoder
from sfumato.condition import reorder, to_device
from sfumato.conditioners import ConditioningInfo
from sfumato.diffusion import Schedule
from sfumato.distributed import current
from sfumato.generation.diffusion_model import Model, SamplingConfig
from sfumato.generation.pipeline import Pipeline
from sfumato.generation.request import ResolvedRequest
from sfumato.storage.atomic import atomic_path
from sfumato.storage.run_directory import RunDirectory
from sfumato.training.config import TrainingConfig
from sfumato.training.denoising_error import (
    Errors,
    Estimate,
    Triples,
    difference,
    make_triples,
    predicted_noise,
)
from sfumato.training.evidence import Comparison
from sfumato.training.monitors import Validator, latents
from sfumato.training.preservation import KnownContexts

MAX_BASE_SAMPLES = 48


class BaseComparison:
    """Compares a model with its base, on held-out new images, if there are any, and on images that
    the base makes.

    The images of the base are sampled once, from noises that are the same afterwards.
    """

    def __init__(
        self,
        *,
        config: TrainingConfig,
        known: KnownContexts,
        validator: Validator | None,
        schedule: Schedule,
        sampling: SamplingConfig,
        autoencoder: Autoencoder,
        directory: RunDirectory,
        info: ConditioningInfo,
        image_shape: tuple[int, int, int],
    ) -> None:
        self.config, self.known, self.validator, self.schedule = config, known, validator, schedule
        self.sampling, self.autoencoder, self.directory = sampling, autoencoder, directory
        self.info, self.image_shape = info, image_shape
        self.context, self.count = known_batch(known)
        self._base_errors: tuple[Errors, Errors] | None = None
        self._known_triples: Triples | None = None
        self._base_prediction: Tensor | None = None

    def compare(self, average: Model, held_out: Errors | None) -> tuple[Comparison, dict[str, Any]]:
        """Compare, and return figures by noise level too, as metrics.jsonl keeps them.

        `validation/gain/*` is the base's squared noise error minus the model's, on the same
        held-out images, noises and levels; `validation/drift/*` the squared change of the predicted
        noise. The gain needs held-out images.

        Args:
            held_out: errors of the model on the images of the validator.
        """
        average.eval()
        drift = self._drift(average) if self.count else {}
        figures = {f"validation/drift/{key}": value for key, value in drift.items()}
        if self.validator is None or held_out is None:
            return Comparison(drift=drift.get("relative")), figures
        before, before_seen = self._errors_of_base(self.validator, average)
        gain = difference(before, held_out, self.validator.look_triples)
        scale = float(before.eps_square.mean())
        comparison = Comparison(
            held_out=tuple(before.by_image().tolist()),
            seen=tuple(before_seen.by_image().tolist()),
            gain=Estimate(*(gain[name] / scale for name in Estimate._fields)),
            drift=drift.get("relative"),
        )
        return comparison, {
            "validation/base/eps_mse": scale,
            **{f"validation/gain/{key}": value for key, value in gain.items()},
            **figures,
        }

    def _errors_of_base(self, validator: Validator, average: Model) -> tuple[Errors, Errors]:
        if self._base_errors is None:
            with self.known.base_of(average) as base:
                model = cast(Model, base)
                self._base_errors = validator.look_errors(model)
        return self._base_errors

    def _drift(self, average: Model) -> dict[str, Any]:
        triples = self._triples(average)
        if self._base_prediction is None:
            with self.known.base_of(average) as base:
                self._base_prediction = self._prediction(cast(Model, base))
        before = self._base_prediction
        change = triples.table(_squared(self._prediction(average) - before))
        bins = [
            {**ends, "mean": float(change[:, number].mean())}
            for number, ends in enumerate(triples.ranges())
        ]
        noise = triples.part(slice(0, len(triples)))[1]
        scale = float(_squared(noise.cpu() - before).mean())
        mean = float(change.mean())
        return {"mean": mean, "relative": mean / scale, "bins": bins}

    def _triples(self, average: Model) -> Triples:
        if self._known_triples is None:
            images = self.base_images(average) * 2 - 1
            x0 = latents(
                self.autoencoder,
                images.to(next(average.parameters()).device),
                seed=self.config.seed,
                batch_size=self.config.effective_micro_batch,
            )
            bins = self.config.validation.bins
            self._known_triples = make_triples(
                x0,
                self.schedule,
                seed=self.config.seed,
                bins=bins,
                draws=max(1, self.config.validation.samples // (bins * len(x0))),
            )
        return self._known_triples

    @torch.no_grad()
    def _prediction(self, model: Model) -> Tensor:
        """Return the predicted noise on noisy images of the base, on the CPU."""
        triples = self._triples(model)
        context = to_device(self.context, triples.x0.device)
        model.eval()
        return predicted_noise(
            model.denoiser(),
            triples,
            model.conditioner(context, self.count),
            batch_size=self.config.effective_micro_batch,
        )

    def base_images(self, average: Model) -> Tensor:
        """Return images of the base under contexts that it knows, (n, C, H, W) in [0, 1].

        They are sampled once, and kept in the run's directory.
        """
        path, world = self.directory.base_samples, current()
        if not world.on_first(path.is_file):
            with self.known.base_of(average) as base:
                images = self.images(cast(Model, base))
            world.on_first(partial(_write, path, images))
        return load_file(path)["images"]

    def images(self, model: Model) -> Tensor:
        """Return images of a model under the same contexts and from the same noises."""
        pipeline = Pipeline(
            model=model,
            autoencoder=self.autoencoder,
            sampling=self.sampling,
            info=self.info,
            image_shape=self.image_shape,
        )
        request = ResolvedRequest.of(self.context, self.image_shape, self.count)
        return pipeline.sample_request(request, seed=self.config.seed)


def known_batch(known: KnownContexts) -> tuple[dict[str, Any], int]:
    """Return the contexts of the images that a base makes, and their number."""
    if not known.count:
        return {}, 0
    numbers = list(range(min(known.count, MAX_BASE_SAMPLES)))
    numbers *= max(1, MAX_BASE_SAMPLES // known.count)
    return reorder(known.values, numbers), len(numbers)


def _squared(values: Tensor) -> Tensor:
    return values.double().square().flatten(1).mean(1)


def _write(path: Path, images: Tensor) -> None:
    with atomic_path(path) as temporary:
        save_file({"images": images.contiguous()}, temporary)
