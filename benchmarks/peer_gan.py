"""A small modern GAN, conditioned on the category, to compare diffusion with.

Relativistic pairing loss, zero-centred gradient penalties on real images and on samples, residual
blocks without norms, Adam without momentum. Source: Huang et al. 2025 (arXiv:2501.05441).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from itertools import count as numbers_from

import torch
from held_out import categories_in_turn
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.networks import UNetConfig
from sfumato.training import PowerEMA
from sfumato.training.ema import Pairs, update

NOISE, EMBEDDING = 64, 64
LEAK = 0.2
SAMPLED_AT_ONCE = 64


def pairing_losses(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses of the discriminator and of the generator, given logits (B,) of pairs.

    They are softplus(fake - real) and softplus(real - fake): each wants its side of a pair to be
    judged the more real one. Source: arXiv:2501.05441, eq. 2 with f(t) = -log(1 + exp(-t)), the
    generator's in the form that does not saturate.
    """
    return F.softplus(fake - real).mean(), F.softplus(real - fake).mean()


def gradient_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """Return half the mean squared norm of the gradient of logits (B,) by images: R1 of real
    images, R2 of samples. Source: arXiv:2501.05441, eqs. 3 and 4.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean() / 2


class Block(nn.Module):
    """x + conv(lrelu(conv(lrelu(x)))), whose last convolution starts at zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.last = convolution(channels, channels), convolution(channels, channels)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        result: Tensor = x + self.last(F.leaky_relu(self.first(F.leaky_relu(x, LEAK)), LEAK))
        return result


def convolution(inputs: int, outputs: int, size: int = 3) -> nn.Conv2d:
    """A convolution initialized for leaky rectifiers."""
    layer = nn.Conv2d(inputs, outputs, size, padding=size // 2)
    nn.init.kaiming_normal_(layer.weight, a=LEAK)
    nn.init.zeros_(layer.bias)
    return layer


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What both networks of a GAN have in common.

    Attributes:
        widths: channels at each depth, from full resolution down.
    """

    image: tuple[int, int, int]
    categories: int
    widths: tuple[int, ...]
    blocks: int

    @property
    def smallest(self) -> tuple[int, int]:
        """The sides at the last depth."""
        factor = 2 ** (len(self.widths) - 1)
        return self.image[1] // factor, self.image[2] // factor


class Generator(nn.Module):
    """(noise (B, NOISE), category (B,)) -> images."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.first = (shape.widths[-1], *shape.smallest)
        self.embedding = nn.Embedding(shape.categories, EMBEDDING)
        self.linear = nn.Linear(NOISE + EMBEDDING, math.prod(self.first))
        layers: list[nn.Module] = []
        for depth in reversed(range(len(shape.widths))):
            layers += [Block(shape.widths[depth]) for _ in range(shape.blocks)]
            if depth:
                layers.append(nn.Upsample(scale_factor=2, mode="bilinear"))
                layers.append(convolution(shape.widths[depth], shape.widths[depth - 1]))
        self.layers = nn.Sequential(*layers)
        self.output = convolution(shape.widths[0], shape.image[0])

    def forward(self, noise: Tensor, category: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        x = self.linear(torch.cat([noise, self.embedding(category)], dim=1))
        x = self.layers(x.view(-1, *self.first))
        result: Tensor = self.output(F.leaky_relu(x, LEAK))
        return result


class Discriminator(nn.Module):
    """(images, category (B,)) -> logits (B,), the mirror image of the generator.

    The category enters by a product with its embedding (Miyato & Koyama 2018, arXiv:1802.05637).
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        layers: list[nn.Module] = [convolution(shape.image[0], shape.widths[0])]
        for depth, width in enumerate(shape.widths):
            layers += [Block(width) for _ in range(shape.blocks)]
            if depth < len(shape.widths) - 1:
                layers += [convolution(width, shape.widths[depth + 1]), nn.AvgPool2d(2)]
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(shape.widths[-1] * math.prod(shape.smallest), EMBEDDING)
        self.embedding = nn.Embedding(shape.categories, EMBEDDING)

    def forward(self, images: Tensor, category: Tensor) -> Tensor:
        """Return (B,)."""
        features = self.linear(F.leaky_relu(self.layers(images), LEAK).flatten(1))
        return (features * self.embedding(category)).sum(1) / math.sqrt(EMBEDDING)


@dataclass(frozen=True, kw_only=True)
class GanConfig:
    """How the GAN is trained.

    Attributes:
        rate: learning rate of both networks at first; it falls by a cosine to `final` of it.
        gamma: weight of the penalties at first; it falls in the same way.
    """

    rate: float = 1e-3
    gamma: float = 0.5
    final: float = 0.1
    batch_size: int = 16
    betas: tuple[float, float] = (0.0, 0.99)


class Gan:
    """A generator with its average, and a discriminator, trained on images in memory.

    Args:
        images, labels: in [-1, 1], (N, C, H, W), and their categories, (N,).
        steps: of training in all.
    """

    def __init__(
        self,
        config: GanConfig,
        shape: Shape,
        images: Tensor,
        labels: Tensor,
        *,
        steps: int,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        self.config, self.images, self.labels, self.steps = config, images, labels, steps
        self.generator, self.discriminator = Generator(shape), Discriminator(shape)
        self.average = copy.deepcopy(self.generator).requires_grad_(False)
        self.pairs = Pairs(self.average, self.generator)
        self.noise, self.done = torch.Generator().manual_seed(seed + 1), 0
        self.optimizers = [
            torch.optim.Adam(part.parameters(), lr=config.rate, betas=config.betas)
            for part in (self.generator, self.discriminator)
        ]

    def step(self) -> dict[str, float]:
        """Train the discriminator, then the generator, on one batch of pairs."""
        fall = self._fall()
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = self.config.rate * fall
        chosen = torch.randint(len(self.images), (self.config.batch_size,), generator=self.noise)
        real, category = self.images[chosen], self.labels[chosen]
        of_generator, of_discriminator = self.optimizers

        self.discriminator.requires_grad_(True)
        with torch.no_grad():
            fake = self._drawn(category)
        both = torch.cat([real, fake]).requires_grad_(True)  # one pass is faster than two
        logits = self.discriminator(both, category.repeat(2))
        loss = pairing_losses(*logits.chunk(2))[0]
        penalties = 2 * gradient_penalty(logits, both)  # R1 + R2: a mean over both is half of it
        of_discriminator.zero_grad()
        (loss + self.config.gamma * fall * penalties).backward()
        of_discriminator.step()

        self.discriminator.requires_grad_(False)
        with torch.no_grad():
            real_logits = self.discriminator(real, category)
        fake_logits = self.discriminator(self._drawn(category), category)
        generator_loss = pairing_losses(real_logits, fake_logits)[1]
        of_generator.zero_grad()
        generator_loss.backward()
        of_generator.step()
        self.done += 1
        update(self.pairs, PowerEMA(0.1), self.done)
        return {"discriminator": loss.item(), "generator": generator_loss.item()}

    def _fall(self) -> float:
        course = (1 + math.cos(math.pi * min(1.0, self.done / self.steps))) / 2
        return self.config.final + (1 - self.config.final) * course

    def _drawn(self, category: Tensor) -> Tensor:
        noise = torch.randn(len(category), NOISE, generator=self.noise)
        result: Tensor = self.generator(noise, category)
        return result

    @torch.no_grad()
    def samples(self, num: int, seed: int) -> Tensor:
        """Return samples of the averaged generator, categories in turn, in [-1, 1]."""
        noise = torch.randn(num, NOISE, generator=torch.Generator().manual_seed(seed))
        category = categories_in_turn(num, self.generator.embedding.num_embeddings)
        parts = zip(noise.split(SAMPLED_AT_ONCE), category.split(SAMPLED_AT_ONCE), strict=True)
        return torch.cat([self.average(*part) for part in parts]).clamp(-1, 1)


def parameters(module: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def gan_shape(
    network: UNetConfig, image: tuple[int, int, int], categories: int, total: int
) -> Shape:
    """The shape whose generator has about `total` parameters: the depths of a U-Net, with as many
    blocks as its upward half.
    """

    def shape(width: int) -> Shape:
        widths = tuple(width * multiplier for multiplier in network.multipliers)
        return Shape(image=image, categories=categories, widths=widths, blocks=network.blocks + 1)

    width = next(w for w in numbers_from(2, 2) if parameters(Generator(shape(w))) >= total)
    return min(
        (shape(width - 2), shape(width)), key=lambda s: abs(parameters(Generator(s)) - total)
    )
