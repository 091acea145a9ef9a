"""The kinds of adapters that peft computes: OFT, LoKr and DoRA.

Sources: OFT, Qiu et al. 2023 (arXiv:2306.07280); LoKr, Yeh et al. 2023 (arXiv:2309.14859); DoRA, Liu
et al. 2024 (arXiv:2402.09353).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from sfumato.adapters.adapter import Adapter, freeze_base
from sfumato.adapters.lora import adaptable_layers, chosen_layers, require_patterns
from sfumato.adapters.peft_adapters import (
    ADAPTED,
    LINEAR,
    NAME,
    PeftLayer,
    adapt,
    bare,
    import_peft,
    peft_layers,
)
from sfumato.config import kind_of
from sfumato.config.bounds import Positive, Size
from sfumato.errors import ConfigError

SHOWN = 3  # layers in a remark


class PeftAdapter(Adapter):
    """A kind of change that peft computes.

    Attributes:
        layers: regular expressions, found in the names of the layers that are adapted.
        convolutions: whether convolutions are adapted too.
    """

    layers: tuple[str, ...]
    convolutions: bool

    def __post_init__(self) -> None:
        require_patterns(self.layers)

    @abstractmethod
    def config(self, targets: str | Sequence[str]) -> Any:
        """Return peft's configuration.

        Args:
            targets: the layers, as `target_modules` of peft.
        """

    def obstacle(self, layer: Any) -> str:
        """Return why peft cannot change a layer of a type that it knows; "" if it can."""
        if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
            return f"padding_mode={layer.padding_mode}"
        return ""

    def require_packages(self) -> None:
        """Raise ConfigError if peft is missing."""
        import_peft()

    def apply(self, network: nn.Module, conditioner: nn.Module) -> None:
        """Freeze the network and the conditioner, and adapt the network's layers.

        Raises:
            ConfigError: if peft is missing, or no layer's name fits.
        """
        network.requires_grad_(False)
        freeze_base(conditioner)
        chosen = chosen_layers(adaptable_layers(network), self.layers, self._kinds())
        fitting = [layer for layer in chosen.values() if not self.obstacle(layer)]
        if not fitting:
            name, layer = next(iter(chosen.items()))
            raise ConfigError(
                f"none of {len(chosen)} layers can be changed so: {name} has {self.obstacle(layer)}",
                where="adapter.layers",
                hint="name others, or use adapter.kind=lora",
            )
        adapt(fitting, self.config(r"\d+"))

    def remarks(self, network: nn.Module) -> Sequence[str]:
        """Return a line on layers whose names fit and that are left as they are."""
        chosen = chosen_layers(adaptable_layers(bare(network)), self.layers, self._kinds())
        left = {name: reason for name, layer in chosen.items() if (reason := self.obstacle(layer))}
        if not left:
            return ()
        return (
            f"{len(left)} of {len(chosen)} layers are left as they are, since peft's {kind_of(type(self))} cannot "
            f"change what has {' or '.join(sorted(set(left.values())))}: {_some(list(left))}",
        )

    def _kinds(self) -> Mapping[type[nn.Module], type[PeftLayer]]:
        return ADAPTED if self.convolutions else LINEAR


@dataclass(frozen=True, kw_only=True)
class OFT(PeftAdapter):
    """The inputs of chosen layers are rotated, in blocks; everything in the network is frozen.

    A rotation keeps the lengths of a weight's rows, and the angles within a block. peft computes it
    by the first terms of a series (Cayley-Neumann).

    Attributes:
        block_size: number of inputs that are rotated together; where it does not divide a layer's
            inputs, the nearest size that does is used.
        layers: regular expressions, found in the names of the layers that are adapted; all linear
            layers by default.
        convolutions: whether 1 x 1 convolutions are adapted too.
    """

    kind: ClassVar[str] = "oft"

    block_size: Size = 32
    layers: tuple[str, ...] = ("",)
    convolutions: bool = False

    @property
    def described(self) -> str:
        """What is trained, in words."""
        return f"OFT with blocks of {self.block_size}"

    def config(self, targets: str | Sequence[str]) -> Any:
        """Return peft's configuration."""
        return import_peft().OFTConfig(
            r=0, oft_block_size=self.block_size, target_modules=targets, bias="none"
        )

    def obstacle(self, layer: Any) -> str:
        """Refuse larger kernels, with which peft's OFT does not begin as the base.

        It sums the patches that it has rotated where they overlap (0.21).
        """
        if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
            return "a kernel larger than 1 x 1"
        return super().obstacle(layer)

    def remarks(self, network: nn.Module) -> Sequence[str]:
        """Return lines on layers that are left as they are, or have blocks of another size."""
        layers = peft_layers(network)
        sizes = {name: layer.peft.oft_block_size[NAME] for name, layer in layers.items()}
        others = [f"{name}: {size}" for name, size in sizes.items() if size != self.block_size]
        lines = [
            f"{len(others)} of {len(layers)} layers have blocks of another size than "
            f"{self.block_size}, which divides their inputs: {_some(others)}"
        ]
        return (*super().remarks(network), *(lines if others else ()))


@dataclass(frozen=True, kw_only=True)
class LoKr(PeftAdapter):
    """Changes of chosen layers that are Kronecker products of two small matrices.

    Attributes:
        rank: of the second, larger matrix; layers where it is at least half of that matrix's side
            have the whole matrix.
        alpha: the change is multiplied by alpha / rank; null for alpha = rank.
        factor: largest side of the first matrix; null for one near the root of the layer's.
        layers: regular expressions, found in the names of the layers that are adapted; all linear
            layers by default.
        convolutions: whether convolutions are adapted too.
    """

    kind: ClassVar[str] = "lokr"
    # few numbers are trained, each of which changes many weights a little
    learning_rate: ClassVar[float | None] = 1e-3

    rank: Size = 16
    alpha: Positive | None = None
    factor: Size | None = None
    layers: tuple[str, ...] = ("",)
    convolutions: bool = False

    @property
    def described(self) -> str:
        """What is trained, in words."""
        return f"LoKr of rank {self.rank}"

    def config(self, targets: str | Sequence[str]) -> Any:
        """Return peft's configuration."""
        return import_peft().LoKrConfig(
            r=self.rank,
            alpha=_number(self.alpha, self.rank),
            decompose_factor=-1 if self.factor is None else self.factor,
            target_modules=targets,
        )


@dataclass(frozen=True, kw_only=True)
class DoRA(PeftAdapter):
    """LoRA of the direction of a weight's rows, whose lengths are trained apart.

    Attributes:
        rank: of each change.
        alpha: the change is multiplied by alpha / rank; null for alpha = rank.
        layers: regular expressions, found in the names of the layers that are adapted; all linear
            layers by default.
        convolutions: whether convolutions are adapted too.
    """

    kind: ClassVar[str] = "dora"

    rank: Size = 16
    alpha: Positive | None = None
    layers: tuple[str, ...] = ("",)
    convolutions: bool = False

    @property
    def described(self) -> str:
        """What is trained, in words."""
        return f"DoRA of rank {self.rank}"

    def config(self, targets: str | Sequence[str]) -> Any:
        """Return peft's configuration."""
        return import_peft().LoraConfig(
            r=self.rank,
            lora_alpha=_number(self.alpha, self.rank),
            use_dora=True,
            target_modules=targets,
            bias="none",
        )

    def obstacle(self, layer: Any) -> str:
        """Refuse dilated convolutions, which peft's second one is not, and int8."""
        if isinstance(layer, nn.Conv2d) and set(layer.dilation) != {1}:
            return "a dilation"
        if not layer.weight.is_floating_point():
            return "a weight that is stored as int8"
        return super().obstacle(layer)

    def remarks(self, network: nn.Module) -> Sequence[str]:
        """Return a line on layers that are left as they are.

        Raises:
            ConfigError: if a layer has a row of zeros, which has no direction.
        """
        zero = [
            name
            for name, layer in peft_layers(network).items()
            if not bool(layer.weight.flatten(1).any(1).all())
        ]
        if zero:
            raise ConfigError(
                f"DoRA divides by the length of a weight's rows, and rows of {_some(zero)} are zero",
                where="adapter.kind",
                hint="name other layers with adapter.layers, or use adapter.kind=lora",
            )
        return super().remarks(network)


def _number(alpha: float | None, rank: int) -> float:
    """Return alpha as a configuration of peft has it: an integer where it is one."""
    value = rank if alpha is None else alpha
    return int(value) if value == int(value) else value


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
