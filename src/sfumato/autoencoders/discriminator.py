"""The discriminator of an autoencoder: it distinguishes real patches from reconstructed ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from sfumato.errors import ConfigError

GROUP_CHANNELS = 16


class PatchDiscriminator(nn.Module):
    """Images (B, C, H, W) -> a score for each patch, (B, h, w); higher is more real.

    It has group norms instead of the source's batch norms, so that an image's score does not depend
    on the others in its batch.

    Source: Isola et al. 2017 (arXiv:1611.07004), sec. 3.2 and appendix 6.1.2.
    """

    def __init__(self, image_channels: int, *, channels: int, layers: int) -> None:
        super().__init__()
        if min(channels, layers) < 1 or channels % GROUP_CHANNELS:
            raise ConfigError(
                f"a discriminator of {channels} channels and {layers} layers",
                where="autoencoder.losses.adversarial",
                hint=f"at least one layer, and channels that are a multiple of {GROUP_CHANNELS}",
            )
        self.smallest = 3 * 2**layers  # side of an image that still has a patch
        modules: list[nn.Module] = [
            nn.Conv2d(image_channels, channels, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        width = channels
        for depth in range(1, layers + 1):
            inputs, width = width, channels * min(2**depth, 8)
            modules += [
                nn.Conv2d(
                    inputs, width, 4, stride=2 if depth < layers else 1, padding=1, bias=False
                ),
                nn.GroupNorm(width // GROUP_CHANNELS, width),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*modules, nn.Conv2d(width, 1, 4, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Score each patch: (B, C, H, W) -> (B, h, w)."""
        result: Tensor = self.layers(x)[:, 0]
        return result


def discriminator_loss(discriminator: PatchDiscriminator, real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's loss, (B,): the hinge loss, averaged over real and generated images.

    The generated images get no gradient from it.

    Source: Lim & Ye 2017 (arXiv:1705.02894).
    """
    losses = F.relu(1 - discriminator(real)), F.relu(1 + discriminator(fake.detach()))
    return torch.stack([loss.flatten(1).mean(1) for loss in losses]).mean(0)


def generator_loss(discriminator: PatchDiscriminator, fake: Tensor) -> Tensor:
    """Return the autoencoder's loss, (B,): minus the mean score of its reconstructions.

    The discriminator gets no gradient from it.
    """
    frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    result: Tensor = -functional_call(discriminator, frozen, (fake,)).flatten(1).mean(1)
    return result


def adaptive_weight(reconstruction: Tensor, generator_loss: Tensor, last: nn.Parameter) -> Tensor:
    """Return the weight at which both losses have gradients of equal norm at the parameter `last`.

    It is at most 10^4. `last` is the weight of the decoder's last layer.

    Source: Esser et al. 2021 (arXiv:2012.09841), eq. 7.
    """
    norms = [
        torch.autograd.grad(loss.sum(), last, retain_graph=True)[0].norm()
        for loss in (reconstruction, generator_loss)
    ]
    result: Tensor = (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4).detach()
    return result
