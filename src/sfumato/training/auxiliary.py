"""Modules that are trained beside a model and dropped afterwards.

They are learned weights of noise levels, and losses on hidden feature maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.config.bounds import Fraction, NonNegative, Positive
from sfumato.errors import ConfigError
from sfumato.networks import Backbone
from sfumato.networks.perceptual import Features
from sfumato.nn.loss_uncertainty import LearnedUncertainty, NoUncertainty

T = TypeVar("T")
# least side of the images that encoders get: of smaller ones, the last feature map of most encoders
# has a single position
MIN_SIDE = 64


@dataclass(frozen=True, kw_only=True)
class DispersiveConfig:
    """A loss that pushes the hidden feature maps of different images apart; it needs no other
    network. It compares the images of one micro-batch, so `micro_batch` matters.

    Attributes:
        weight: of the loss.
        temperature: distances are divided by it; smaller looks at near neighbours only.
        stop_at: share of the budget after which it ends.

    Source: Wang & He 2025 (arXiv:2506.09027), eq. 6 (the InfoNCE variant with squared distances)
        and table 3.
    """

    weight: NonNegative = 0.5
    temperature: Positive = 0.5
    stop_at: Fraction = 1.0

    def __post_init__(self) -> None:
        _check(self.weight, self.stop_at)
        if not self.temperature > 0:
            raise ConfigError(
                f"temperature = {self.temperature}", where="auxiliary", hint="use more than 0"
            )


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """A loss that aligns hidden feature maps, after a convolution that is trained with it, with
    those of a frozen encoder.

    Attributes:
        encoder: a folder of a vision transformer (DINOv2 and its like; extra `text`),
            `efficientnet-lite0`, or a file: see `evaluation.extractors.extractor`.
        weight: of the loss.
        stop_at: share of the budget after which it ends: the encoder's view helps early and hinders
            late.

    Source: Yu et al. 2025 (arXiv:2410.06940), eq. 8; the convolution, and maps without their mean:
        Singh et al. 2025 (arXiv:2512.10794); ending early: Wang et al. 2025 (arXiv:2505.16792).
    """

    encoder: str = "efficientnet-lite0"
    weight: NonNegative = 0.5
    stop_at: Fraction = 0.4

    def __post_init__(self) -> None:
        _check(self.weight, self.stop_at)


@dataclass(frozen=True, kw_only=True)
class AuxiliaryConfig:
    """Training components that are not part of the model.

    Attributes:
        uncertainty: learned uncertainty weighting for each noise level (EDM2).
        dispersive: pushes the hidden maps of different images apart.
        alignment: aligns hidden feature maps with those of a frozen encoder of the clean image
            (REPA).
    """

    uncertainty: bool = False
    dispersive: DispersiveConfig | None = None
    alignment: AlignmentConfig | None = None

    def build(self, network: Backbone, *, encoder: Callable[[str], Features]) -> Auxiliary:
        """Build the configured modules, and hook them to the network's `probe`.

        Args:
            network: the network whose hidden map the losses read.
            encoder: returns the frozen network of a name.
        Raises:
            ConfigError: for a loss on hidden maps if the network has none.
        """
        if (self.dispersive or self.alignment) and not network.hidden_channels:
            raise ConfigError(
                f"{type(network).__name__} passes no hidden map through its `probe`, which this "
                "loss reads",
                where="auxiliary.dispersive" if self.dispersive else "auxiliary.alignment",
                hint="leave the loss out, or set `hidden_channels` and call `self.probe` in the "
                "network's forward",
            )
        terms: dict[str, nn.Module] = {}
        if self.dispersive is not None:
            terms["dispersive"] = Dispersive(self.dispersive)
        if self.alignment is not None:
            terms["alignment"] = Alignment(
                self.alignment, network.hidden_channels, encoder(self.alignment.encoder)
            )
        auxiliary = Auxiliary(LearnedUncertainty() if self.uncertainty else NoUncertainty(), terms)
        if terms:
            network.probe.register_forward_hook(auxiliary.capture_hidden)
        return auxiliary


class Auxiliary(nn.Module):
    """The weights of noise levels, and losses on the hidden map by name.

    Each loss is a module (hidden, images) -> (B,) with a `config`.
    """

    def __init__(self, uncertainty: nn.Module, terms: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.uncertainty, self.terms = uncertainty, nn.ModuleDict(terms)
        self._captured: Shared[dict[str, Tensor]] = Shared({})

    def capture_hidden(self, probe: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Store the hidden map of the network's last call."""
        self._captured.value["hidden"] = output

    def losses(self, images: Tensor, *, progress: float) -> dict[str, tuple[float, Tensor]]:
        """Return the weight and the value (B,) of each loss that is still active, by name.

        A loss is active while `progress`, the used fraction of the budget, is below its `stop_at`.
        """
        terms = ((name, cast(Any, term)) for name, term in self.terms.items())
        captured = self._captured.value
        return {
            name: (term.config.weight, term(captured["hidden"], images))
            for name, term in terms
            if progress < term.config.stop_at
        }


class Dispersive(nn.Module):
    """The loss of `DispersiveConfig`."""

    def __init__(self, config: DispersiveConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, hidden: Tensor, images: Tensor) -> Tensor:
        """Return the loss of hidden (B, ...), (B,); the images are not used."""
        return dispersive_loss(hidden, self.config.temperature)


class Alignment(nn.Module):
    """The loss of `AlignmentConfig`. The frozen encoder is not saved, copied or moved with it."""

    def __init__(self, config: AlignmentConfig, hidden_channels: int, encoder: Features) -> None:
        super().__init__()
        self.config, self._frozen = config, Shared(encoder)
        device = next(encoder.parameters()).device if isinstance(encoder, nn.Module) else None
        channels = encoder.maps(torch.zeros(1, 3, MIN_SIDE, MIN_SIDE, device=device))[-1].shape[1]
        self.project = nn.Conv2d(hidden_channels, channels, 3, padding=1)

    def forward(self, hidden: Tensor, images: Tensor) -> Tensor:
        """Return the loss (B,) of hidden (B, D, h, w) against the encoder's last feature map."""
        with torch.no_grad():
            target = self._frozen.value.maps(upsample_to(images, MIN_SIDE))[-1]
        return cosine_alignment_loss(self.project(hidden.float()), target)


class Shared(Generic[T]):
    """A value that is shared, not copied, when its owner is deep-copied."""

    def __init__(self, value: T) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared[T]:
        return self


def _check(weight: float, stop_at: float) -> None:
    if not (weight >= 0 and 0 < stop_at <= 1):
        raise ConfigError(
            f"weight = {weight}, stop_at = {stop_at}",
            where="auxiliary",
            hint="a weight of at least 0, stop_at a fraction up to 1",
        )


def dispersive_loss(hidden: Tensor, temperature: float) -> Tensor:
    """Return log mean exp(-d / temperature) over all pairs of samples: (B, ...) -> (B,), all equal.

    d is the mean squared difference of two hidden maps. Each map is also paired with itself.
    """
    flat = hidden.float().flatten(1)
    # cdist computes distances from products. A mean that all maps share would cancel in them, and
    # take most of the significant digits with it.
    flat = flat - flat.mean(0, keepdim=True)
    squared = torch.cdist(flat, flat).square() / flat.shape[1]
    return (
        torch.logsumexp(-squared.flatten() / temperature, 0)
        .sub(2 * math.log(len(flat)))
        .expand(len(flat))
    )


def upsample_to(images: Tensor, side: int) -> Tensor:
    """Upsample images (B, C, H, W) whose shorter side is below `side` to that length."""
    height, width = images.shape[2:]
    factor = max(1.0, side / min(height, width))
    size = (round(height * factor), round(width * factor))
    return (
        images
        if factor == 1
        else F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
    )


def cosine_alignment_loss(projected: Tensor, target: Tensor) -> Tensor:
    """Return 1 - cosine similarity of maps (B, D, h, w) and (B, D, H, W), averaged to (B,).

    `target` is averaged, or repeated, to the size of `projected`. If both have several positions,
    the spatial mean of `target` is subtracted first, since it says little about where things are.
    """
    several = min(target[0, 0].numel(), projected[0, 0].numel()) > 1
    target = F.adaptive_avg_pool2d(target, (projected.shape[2], projected.shape[3]))
    target = target - target.mean((2, 3), keepdim=True) * several
    return 1 - F.cosine_similarity(projected.float(), target.float(), dim=1).flatten(1).mean(1)
