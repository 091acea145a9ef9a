"""What of a model is trained, and what is left of its base."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from sfumato.condition import ContextSizes
from sfumato.config import Extensible


class Addition(nn.Module):
    """A trainable part that was added to a frozen base, and can be switched off.

    Attributes:
        adapted: whether it acts; without it, the base is left.
    """

    adapted: bool = True


class ChangedLayer(Addition, ABC):
    """A layer of a base, with a trained change of its weight.

    Attributes:
        added: names of the parameters and modules that the layer has beside its own.
        weight: the layer's own, frozen.
    """

    added: ClassVar[tuple[str, ...]] = ()
    weight: Tensor

    @abstractmethod
    def delta(self) -> Tensor:
        """Return the change of the layer's weight, of its shape, in float32."""


def changed_layers(module: nn.Module) -> dict[str, ChangedLayer]:
    """Return the layers of a module whose weights are changed, by name."""
    return {
        name: layer for name, layer in module.named_modules() if isinstance(layer, ChangedLayer)
    }


def without_added(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state dict without what its changed layers have beside their own."""
    added = {
        f"{path}.{name}"
        for path, layer in changed_layers(module).items()
        for name, _ in layer.named_parameters()
        if name.partition(".")[0] in layer.added
    }
    return {name: tensor for name, tensor in state.items() if name not in added}


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """Use the frozen base alone within the block."""
    additions = [part for part in module.modules() if isinstance(part, Addition)]
    before = [part.adapted for part in additions]
    try:
        for part in additions:
            part.adapted = False
        yield
    finally:
        for part, adapted in zip(additions, before, strict=True):
            part.adapted = adapted


# Returns the block in which a model, or another one in its place, is the base.
BaseOf = Callable[[nn.Module], AbstractContextManager[nn.Module]]


class AdaptableConditioner(nn.Module):
    """What adapters know of a model's conditioner.

    Attributes:
        sizes: of the condition's slots.
        factor: side of an image over that of the network's input.
    """

    sizes: ContextSizes
    factor: int

    def include_text_encoders(self) -> None:
        """Make the text encoders child modules, so that changes of their layers are trained."""
        return

    def text_layers(self) -> Mapping[str, nn.Module]:
        """Return the layers of text encoders that can be trained, by the encoder's name and their
        own; {} if there are none.
        """
        return {}


class Adapter(Extensible, ABC):
    """A choice of what is trained. A dataclass derived from this class is a kind of adapter.

    Attributes:
        needs_base: whether the trained weights are of no use without the base.
        learning_rate: that suits it; None for one that depends on the model.
        keeps_known: whether the model gives what its base gives for all that the base can read,
            whatever is learned.
        contexts: that it needs beside those of the base, by name, and their settings.
    """

    needs_base: ClassVar[bool] = True
    learning_rate: ClassVar[float | None] = None
    keeps_known: ClassVar[bool] = False
    contexts: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @property
    @abstractmethod
    def described(self) -> str:
        """What is trained, in words."""

    @property
    def begins_with(self) -> str:
        """Path of a file or a run whose values the trained parts begin with; "" for none."""
        return ""

    def require_data(self, conditioner: nn.Module, captions: Sequence[Sequence[str]]) -> None:
        """Raise ConfigError if nothing can be learned from the training images.

        Args:
            conditioner: that `apply` was given.
            captions: those of each image.
        """
        return

    def require_packages(self) -> None:
        """Raise ConfigError, naming the extra, if a package is missing that the adapter needs."""
        return

    def remarks(self, network: nn.Module) -> Sequence[str]:
        """Return lines on what of the settings does not fit a network, after `apply`.

        Raises:
            ConfigError: if the network's weights are such that it cannot be trained so.
        """
        return ()

    def base_sizes(self, sizes: ContextSizes) -> ContextSizes:
        """Return the sizes of the condition that the base reads, of those of the conditioner."""
        return sizes

    @abstractmethod
    def apply(self, network: nn.Module, conditioner: AdaptableConditioner) -> None:
        """Freeze what is not trained, and add what is."""

    def base_of(self, model: nn.Module) -> BaseOf:
        """Return how the base is had back from a model that is trained.

        Args:
            model: before its first step.
        """
        return _switched_off


@contextmanager
def _switched_off(model: nn.Module) -> Iterator[nn.Module]:
    with without_adapters(model):
        yield model


def freeze_base(conditioner: nn.Module) -> None:
    """Freeze all parameters of a conditioner but its additions."""
    conditioner.requires_grad_(False)
    for part in conditioner.modules():
        if isinstance(part, Addition):
            part.requires_grad_(True)


@dataclass(frozen=True)
class WholeNetwork(Adapter):
    """All weights of the model are trained."""

    kind: ClassVar[str] = "none"
    needs_base: ClassVar[bool] = False

    @property
    def described(self) -> str:
        """What is trained, in words."""
        return "all weights of the network"

    def apply(self, network: nn.Module, conditioner: nn.Module) -> None:
        """Change nothing."""

    def base_of(self, model: nn.Module) -> BaseOf:
        """Keep a copy of the model."""
        base = copy.deepcopy(model).eval().requires_grad_(False)
        return lambda model: nullcontext(base)
