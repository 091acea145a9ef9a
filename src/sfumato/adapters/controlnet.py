"""ControlNet: a trained copy of a frozen U-Net's first half reads what lies over the image, such as
a doodle, and adds to the features of the second half. It begins by adding zeros.

Source: Zhang, Rao & Agrawala 2023 (arXiv:2302.05543).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from sfumato.adapters.adapter import AdaptableConditioner, Adapter, Addition, freeze_base
from sfumato.condition import ContextSizes
from sfumato.errors import ConfigError
from sfumato.nn.controllable import Controllable


class Control(Addition):
    """A control branch; without it, nothing is added to the network's features."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, *arguments: Any) -> dict[str, Any]:
        """Return what the branch adds; see `Controllable.control`."""
        result: dict[str, Any] = self.branch(*arguments) if self.adapted else {}
        return result


@dataclass(frozen=True, kw_only=True)
class ControlNet(Adapter):
    """A control branch beside the frozen U-Net of Stable Diffusion (1, 2, XL), steered by what lies
    over the image: doodles unless another context is configured.
    """

    kind: ClassVar[str] = "controlnet"
    learning_rate: ClassVar[float | None] = 5e-5
    # in all predictions, as in the pipelines of diffusers: guidance acts on the text alone
    contexts: ClassVar[Mapping[str, Mapping[str, Any]]] = {"doodle": {"guided": False}}

    @property
    def described(self) -> str:
        """What is trained, in words."""
        return "ControlNet: a control branch beside the network"

    def base_sizes(self, sizes: ContextSizes) -> ContextSizes:
        """Return the sizes without those of maps, which the branch alone reads."""
        return replace(sizes, spatial=0)

    def apply(self, network: nn.Module, conditioner: AdaptableConditioner) -> None:
        """Freeze the network and the conditioner, and put a control branch beside the network.

        Raises:
            ConfigError: if the network is of another kind, or nothing lies over the image.
        """
        if not isinstance(network, Controllable):
            raise ConfigError(
                "the network cannot have a control branch",
                where="adapter.kind",
                hint="UNet2DConditionModel of diffusers can; for others, train with the context "
                "from the start, or use adapter.kind=lora",
            )
        sizes, factor = conditioner.sizes, conditioner.factor
        if not sizes.spatial:
            raise ConfigError(
                "a control branch needs a context that lies over the image",
                where="conditioner",
                hint="use conditioner.doodle.guided=false, or another such as conditioner.image",
            )
        network.requires_grad_(False)
        freeze_base(conditioner)
        branch = network.new_control(sizes.spatial // factor**2, factor)
        network.control = Control(branch.requires_grad_(True))
        network.context = sizes
