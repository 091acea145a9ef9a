"""How a training image was resized and cropped, as a condition, so that it is not learned as part
of the data.

Source: Podell et al. 2023 (arXiv:2307.01952), section 2.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.condition import Condition, ContextSizes
from sfumato.conditioners.protocol import Conditioner

NUMBERS = 4


@dataclass(frozen=True, kw_only=True)
class ResizingConfig:
    """Tell the network how each training image was resized and cropped (Stable Diffusion XL).
    Samples are told that nothing was done.
    """

    kind: ClassVar[str] = "resizing"


class ResizingConditioner(Conditioner):
    """context["resizing"] (B, 4) -> Condition.vector (B, 4): pixels that the image lost in height
    and in width when it was resized, negative where it was enlarged, and pixels that were then cut
    off at the top and at the left.

    Zeros, or a missing context, mean that nothing was done.
    """

    nothing: Tensor
    is_user_input = False
    dropout = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.sizes = ContextSizes(vector=NUMBERS)
        self.register_buffer("nothing", torch.zeros(NUMBERS), persistent=False)

    def forward(self, context: Mapping[str, Any], batch_size: int) -> Condition:
        """Return the numbers as the vector; zeros if none are given."""
        if "resizing" not in context:
            return self.null(batch_size)
        return Condition(vector=context["resizing"].to(self.nothing))

    def null(self, batch_size: int) -> Condition:
        """Return zeros: nothing was done."""
        return Condition(vector=self.nothing.expand(batch_size, -1))
