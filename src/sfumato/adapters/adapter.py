"""What of a network is trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from sfumato.config import Extensible


class Adapter(Extensible, ABC):
    """A choice of what is trained. A dataclass derived from this class is a kind of adapter."""

    @abstractmethod
    def apply(self, network: nn.Module) -> None:
        """Freeze what is not trained, and add what is."""


@dataclass(frozen=True)
class WholeNetwork(Adapter):
    """All weights of the network are trained."""

    kind: ClassVar[str] = "none"

    def apply(self, network: nn.Module) -> None:
        """Change nothing."""
