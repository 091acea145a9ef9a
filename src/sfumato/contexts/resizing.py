"""Resizing: how a training image was resized and cropped; requests cannot set it."""

from __future__ import annotations

from sfumato.conditioners import ConditioningInfo, ResizingConditioner, ResizingConfig
from sfumato.contexts.protocol import Context, Encoder


class Resizing(Context):
    """How a training image was resized and cropped, for networks that are told (Stable Diffusion
    XL).
    """

    name = "resizing"
    config = ResizingConfig
    is_user_input = False

    def build(
        self, config: ResizingConfig, info: ConditioningInfo, encoder: Encoder
    ) -> ResizingConditioner:
        """Build the conditioner; nothing in it is trained."""
        return ResizingConditioner()
