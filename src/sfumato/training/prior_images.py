"""Preservation by prior images, as in DreamBooth: beside the new images, the model is trained on
images of what its base knows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato import randomness
from sfumato.autoencoders import Autoencoder
from sfumato.condition import ContextValues, reorder, to_device
from sfumato.diffusion import NoiseLevel, Objective
from sfumato.generation.diffusion_model import Model
from sfumato.training.preservation import PreservationConfig, PreservationLoss


@dataclass(frozen=True, kw_only=True)
class PriorImages:
    """Images of what a base knows, with their contexts.

    Attributes:
        moments: of their latents, as the autoencoder returns them, (N, ...), on the CPU.
        context: values of each, by the name of the context.
        digest: a hash of the images and their contexts.
    """

    moments: Tensor
    context: ContextValues
    digest: str


class PriorImagesLoss(PreservationLoss):
    """The training loss of prior images, one drawn for each new sample.

    Source: Ruiz et al. 2023 (arXiv:2208.12242), eq. 2: the second term, the same loss as that of
        the new images. The paper lets the base make the images.
    """

    def __init__(
        self,
        config: PreservationConfig,
        prior: PriorImages,
        objective: Objective,
        autoencoder: Autoencoder,
        *,
        seed: int,
    ) -> None:
        self.weight, self.digest = config.weight, prior.digest
        self._prior, self._objective, self._autoencoder = prior, objective, autoencoder
        self._seed = seed

    def loss(self, model: Model, x0: Tensor, *, first: int, dtype: torch.dtype) -> Tensor:
        """Return the objective's loss of as many prior images as there are new ones, (B,).

        Images, latents, noises and levels are keyed by the samples' numbers, `first` and
        following.

        Args:
            x0: new images or their latents (B, C, H, W), of which only the number matters.
        """
        count, device = len(x0), x0.device
        draws = randomness.uniform(self._seed, "prior", first=first, count=count, per_item=2)
        level = self._objective.levels(draws[:, 0])
        numbers = (draws[:, 1] * len(self._prior.moments)).long()

        def normal(use: str, shape: tuple[int, ...]) -> Tensor:
            return randomness.normal(
                self._seed, f"prior/{use}", first=first, shape=shape, device=device
            )

        clean = self._autoencoder.sample_posterior(
            self._prior.moments[numbers].to(device), lambda shape: normal("latent", shape)
        )
        context = to_device(reorder(self._prior.context, numbers.tolist()), device)
        return self._objective(
            model.denoiser(dtype),
            clean,
            model.conditioner(context, count),
            level=NoiseLevel(*(value.float().to(device) for value in level)),
            noise=normal("noise", tuple(clean.shape)),
        ).per_sample
