"""What compiling and float8 need from a module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from torch import nn


class Accelerable(nn.Module):
    """The part of a model that takes most of the time.

    Attributes:
        compile_after_s: seconds of training on a CPU from which compiling it pays; infinity where
            it never does.
    """

    compile_after_s: ClassVar[float] = math.inf

    def units(self) -> Sequence[nn.Module]:
        """Return the modules that are called one after another, and together hold most parameters:
        where processes share a network, each is gathered when it is needed. None by default.
        """
        return ()

    def float8_layers(self) -> Sequence[nn.Linear]:
        """Return the linear layers that may multiply in float8; none by default."""
        return ()
