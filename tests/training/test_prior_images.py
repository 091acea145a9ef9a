"""Preservation by prior images: the loss of DreamBooth, against one computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from sfumato import randomness
from sfumato.autoencoders import LatentAutoencoder
from sfumato.autoencoders.latent_space import Pixels
from sfumato.conditioners import CategoryConfig, CompositeConditioner
from sfumato.diffusion import Linear, NoiseLevel, Objective, Velocity
from sfumato.errors import ConfigError
from sfumato.generation.diffusion_model import DenoiserConfig, Model
from sfumato.networks import UNetConfig
from sfumato.training import PreservationConfig
from sfumato.training.prior_images import PriorImages, PriorImagesLoss

SEED, FIRST, COUNT, PRIOR = 5, 24, 6, 4
SHAPE = (1, 8, 8)


def model() -> Model:
    torch.manual_seed(0)
    part = CategoryConfig(size=8).build(["a", "b", "c"])
    conditioner = CompositeConditioner({"category": part})
    network = UNetConfig(
        channels=32, multipliers=(1,), blocks=1, attention_depths=(0,), head_channels=32
    ).build(image_channels=1, context=conditioner.sizes)
    with torch.no_grad():
        for parameter in network.parameters():  # zeros at the ends would hide everything
            parameter.add_(0.05 * torch.randn_like(parameter))
    return Model(network, conditioner, DenoiserConfig(parameterization=Velocity())).eval()


class Halves(nn.Module):
    """A codec whose latents are the images halved, with the deviation 1/10."""

    factor, latent_channels, image_channels = 1, 1, 1

    def moments(self, x: Tensor) -> Tensor:
        return torch.cat([x / 2, torch.full_like(x, 2 * math.log(0.1))], 1)


def expected(tuned: Model, prior: PriorImages, latents: Tensor) -> Tensor:
    """|v(x_t, c) - (alpha eps - sigma x0)|^2 on the linear path, with every draw written out."""
    draws = randomness.uniform(SEED, "prior", first=FIRST, count=COUNT, per_item=2)
    level = Objective(schedule=Linear()).levels(draws[:, 0])
    alpha, sigma = (value.float().view(-1, 1, 1, 1) for value in level)
    number = (draws[:, 1] * PRIOR).long()
    noise = randomness.normal(SEED, "prior/noise", first=FIRST, shape=(COUNT, *SHAPE))
    x0 = latents[number]
    condition = tuned.conditioner({"category": prior.context["category"][number]}, COUNT)
    with torch.no_grad():
        level = NoiseLevel(*(value.float() for value in level))
        output = tuned.denoiser().predict(alpha * x0 + sigma * noise, level, condition)
    k = torch.hypot(alpha, sigma)
    return (output - (alpha * noise - sigma * x0) / k).square().flatten(1).mean(1)


def prior_images(moments: Tensor) -> PriorImages:
    return PriorImages(
        moments=moments, context={"category": torch.tensor([0, 1, 2, 0])}, digest="hash"
    )


def test_it_is_the_training_loss_of_prior_images() -> None:
    images = torch.randn(PRIOR, *SHAPE, generator=torch.Generator().manual_seed(1))
    tuned, prior = model(), prior_images(images)
    loss = PriorImagesLoss(
        PreservationConfig(num=PRIOR, weight=0.5),
        prior,
        Objective(schedule=Linear()),
        Pixels(1),
        seed=SEED,
    )
    assert (loss.weight, loss.digest) == (0.5, "hash")
    found = loss.loss(tuned, torch.zeros(COUNT, *SHAPE), first=FIRST, dtype=torch.float32)
    found.sum().backward()
    assert torch.allclose(found.detach(), expected(tuned, prior, images), rtol=1e-5)
    assert all(parameter.grad is not None for parameter in tuned.network.parameters())
    # the new images do not matter, and other samples have other draws
    again = loss.loss(tuned, torch.ones(COUNT, *SHAPE), first=FIRST, dtype=torch.float32)
    assert torch.equal(again, found)
    next_one = loss.loss(tuned, torch.ones(1, *SHAPE), first=FIRST + 1, dtype=torch.float32)
    assert not torch.allclose(next_one[0], found[0])


def test_in_latents_each_sample_draws_one() -> None:
    autoencoder = LatentAutoencoder(Halves(), torch.tensor([0.5]), torch.tensor([2.0]))
    images = torch.randn(PRIOR, *SHAPE, generator=torch.Generator().manual_seed(1))
    tuned, prior = model(), prior_images(autoencoder.moments(images))
    loss = PriorImagesLoss(
        PreservationConfig(num=PRIOR), prior, Objective(schedule=Linear()), autoencoder, seed=SEED
    )
    found = loss.loss(tuned, torch.zeros(COUNT, *SHAPE), first=FIRST, dtype=torch.float32)
    draws = randomness.uniform(SEED, "prior", first=FIRST, count=COUNT, per_item=2)
    number = (draws[:, 1] * PRIOR).long()
    gaussian = randomness.normal(SEED, "prior/latent", first=FIRST, shape=(COUNT, *SHAPE))
    drawn = (images[number] / 2 + 0.1 * gaussian - 0.5) / 2
    latents = torch.zeros(COUNT, *SHAPE)
    whole = expected(tuned, prior, latents)  # a wrong latent gives another loss
    assert not torch.allclose(found.detach(), whole, rtol=1e-2)
    by_sample = []
    for row in range(COUNT):
        latents = torch.zeros(PRIOR, *SHAPE)
        latents[number[row]] = drawn[row]
        by_sample.append(expected(tuned, prior, latents)[row])
    assert torch.allclose(found.detach(), torch.stack(by_sample), rtol=1e-4)


def test_images_are_given_or_made_not_both() -> None:
    with pytest.raises(ConfigError, match="set one of the two"):
        PreservationConfig(source="dogs", num=4)
