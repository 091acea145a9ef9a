"""What a diffusion model learns: to separate the noise from the image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor

from sfumato import randomness
from sfumato.autoencoders import Autoencoder
from sfumato.condition import select_rows, to_device
from sfumato.conditioners import ConditioningInfo
from sfumato.data import Batch, Dataset, ShapeGroup
from sfumato.diffusion import NoiseLevel, Objective
from sfumato.generation.diffusion_model import Model, SamplingConfig
from sfumato.nn.accelerable import Accelerable
from sfumato.nn.loss_uncertainty import weight_by_uncertainty
from sfumato.sampling import StepInfo, count_evaluations, grid
from sfumato.storage.run_directory import RunDirectory
from sfumato.training.auxiliary import Auxiliary
from sfumato.training.config import TrainingConfig
from sfumato.training.loss_mask import loss_weights
from sfumato.training.monitors import Previewer, Validator
from sfumato.training.preservation import PreservationLoss
from sfumato.training.tasks.protocol import OptimizedPart, SampleLosses

LOGSNR_EDGES = (-6.0, -3.0, 0.0, 3.0, 6.0)


class Diffusion:
    """Mixes images, or their latents, with noise at random levels.

    The network predicts what was mixed.

    Attributes:
        validator: measures errors on held-out images; None if nothing is held out.
    """

    def __init__(
        self,
        config: TrainingConfig,
        *,
        model: Model,
        autoencoder: Autoencoder,
        objective: Objective,
        dataset: Dataset,
        sampling: SamplingConfig,
        directory: RunDirectory,
        info: ConditioningInfo,
        preservation: PreservationLoss | None = None,
    ) -> None:
        """Prepare validation and previews.

        Args:
            preservation: the loss that keeps what the base of a fine-tuning knew.
        """
        self.config, self.model, self.autoencoder, self.objective = (
            config,
            model,
            autoencoder,
            objective,
        )
        self.facts = {"facts": asdict(info), "image_shape": list(dataset.image_shape)}
        self._preservation = preservation
        if preservation is not None and preservation.digest:
            self.facts["prior_images"] = preservation.digest
        self._device, self._sampling = next(model.parameters()).device, sampling
        self.validator: Validator | None = None
        if len(dataset.holdout):
            self.validator = Validator(
                config=config,
                dataset=dataset,
                schedule=objective.schedule,
                conditioner=model.conditioner,
                autoencoder=autoencoder,
                device=self._device,
            )
        self._previewer = Previewer(
            config=config,
            dataset=dataset,
            sampling=sampling,
            conditioner=model.conditioner,
            autoencoder=autoencoder,
            directory=directory,
            info=info,
        )

    def optimized_parts(self, model: Model) -> list[OptimizedPart]:
        """Return a single part that holds all trained parameters."""
        return [OptimizedPart("model", model, self.config.optimizer)]

    def loss(
        self,
        model: Model,
        batch: Batch,
        group: ShapeGroup,
        chosen: slice,
        *,
        progress: float,
        dtype: torch.dtype,
    ) -> SampleLosses:
        """Return the objective's loss of each sample plus the active auxiliary losses, (n,).

        Each sample has one noise level; the levels of a whole batch are spread evenly.
        """
        device = self._device
        images, first, seed = (
            group.images[chosen].to(device),
            group.first + chosen.start,
            self.config.seed,
        )
        count, offset = len(images), group.first - batch.first + chosen.start
        times = randomness.uniform(seed, "time", first=batch.first, count=batch.size)[:, 0]
        levels = self.objective.levels(times)
        level = NoiseLevel(*(value[offset : offset + count].float().to(device) for value in levels))
        draws = randomness.uniform(
            seed,
            "condition dropout",
            first=first,
            count=count,
            per_item=max(1, len(model.conditioner.parts)),
        )
        context = to_device(select_rows(group.context, chosen), device)
        context = model.conditioner.training_context(images, context, seed=seed, first=first)
        randomness.key_layers(seed, first=first, count=count, device=device)
        x0 = self._encoded(
            images, None if group.moments is None else group.moments[chosen].to(device), first
        )
        noise = randomness.normal(seed, "noise", first=first, shape=tuple(x0.shape), device=device)
        condition = model.conditioner(context, count, draws=draws)
        auxiliary = cast(Auxiliary, model.auxiliary)
        denoising_loss = self.objective(
            model.denoiser(dtype),
            x0,
            condition,
            level=level,
            noise=noise,
            weights=loss_weights(group.context, chosen, like=x0),
        ).per_sample
        total = weight_by_uncertainty(denoising_loss, auxiliary.uncertainty(level.logsnr()))
        auxiliary_losses = auxiliary.losses(images, progress=progress)
        if self._preservation is not None:
            kept = self._preservation.loss(model, x0, first=first, dtype=dtype)
            auxiliary_losses["preservation"] = (self._preservation.weight, kept)
        for weight, value in auxiliary_losses.values():
            total = total + weight * value
        return SampleLosses(
            total,
            {
                "logsnr": level.logsnr(),
                "loss": denoising_loss,
                **{name: value for name, (_, value) in auxiliary_losses.items()},
            },
        )

    @torch.no_grad()
    def _encoded(self, images: Tensor, moments: Tensor | None, first: int) -> Tensor:
        return self.autoencoder.sample_posterior(
            self.autoencoder.moments(images) if moments is None else moments,
            lambda shape: randomness.normal(
                self.config.seed, "latent", first=first, shape=shape, device=self._device
            ),
        )

    def log_metrics(self, losses: SampleLosses) -> dict[str, float]:
        """Return the mean of the loss by range of log-SNR, and of each auxiliary loss.

        Ranges without samples are left out.
        """
        number = torch.bucketize(losses.notes["logsnr"], torch.tensor(LOGSNR_EDGES))
        names = [f"below{LOGSNR_EDGES[0]:+g}", *(f"from{low:+g}" for low in LOGSNR_EDGES)]
        return {
            f"train/loss_by_logsnr/{name}": float(losses.notes["loss"][number == index].mean())
            for index, name in enumerate(names)
            if (number == index).any()
        } | {
            f"train/{name}": float(value.mean())
            for name, value in losses.notes.items()
            if name not in ("logsnr", "loss")
        }

    def validate(self, model: Model, average: Model) -> dict[str, Any]:
        """Return the figures of `Validator.figures`; {} if nothing is held out."""
        return {} if self.validator is None else self.validator.figures(model, average)

    def summary(self, figures: Mapping[str, Any]) -> str:
        """Format the errors of the averaged weights in one line."""
        return (
            f"held-out noise error MSE {figures['validation/ema/eps_mse']:.4f} RMSE "
            f"{figures['validation/ema/eps_rmse']:.4f} "
            f"MAE {figures['validation/ema/eps_mae']:.4f}  R2 {figures['validation/ema/r2']:.3f}  "
            f"skill {figures['validation/ema/skill']:.3f}  held-out / training "
            f"{figures['validation/ratio/mean']:.2f}"
        )

    def preview(self, average: Model, step: int, on_step: Callable[[StepInfo], None]) -> None:
        """Write a preview; see `Previewer.show`."""
        self._previewer.show(average, step, on_step)

    def forward_images(self, config: TrainingConfig) -> tuple[int, int]:
        """Return the images that go through the network in one preview and in one validation.

        Guidance doubles those of a preview. A validation takes one pass for the weights, two for
        their average, and one for each shuffled context.
        """
        contexts, sampling = self.model.conditioner.user_inputs, self._sampling
        guided = 2 if contexts and sampling.guidance != 1 else 1
        levels = grid(sampling.schedule, sampling.steps, spacing=sampling.spacing)
        evaluations = guided * count_evaluations(sampling.sampler, levels)
        samples = 0 if self.validator is None else config.validation.samples
        return config.preview.num * evaluations, samples * (3 + len(contexts))

    def compiled_part(self, model: Model) -> Accelerable:
        """Return the network; conditioners are small."""
        return model.network
