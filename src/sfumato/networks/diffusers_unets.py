"""U-Nets of diffusers as backbones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.condition import NO_CONTEXT, Condition, ContextSizes
from sfumato.networks.diffusers_backbone import DiffusersBackbone
from sfumato.networks.diffusers_control import UNetControl, new_branch
from sfumato.nn.controllable import Controllable, NoControl


class DiffusersUNet(DiffusersBackbone):
    """A U-Net, which downsamples between its blocks."""

    input_name: ClassVar[str] = "conv_in"

    @property
    def multiple(self) -> int:
        """The factor by which the network downsamples."""
        return int(2 ** (len(self.settings["down_block_types"]) - 1))


class UNet2D(DiffusersUNet):
    """UNet2DModel, of DDPM: unconditional."""

    legal: ClassVar = {"class_embed_type": (None,), "num_class_embeds": (None,)}

    def call(self, x: Tensor, noise_input: Tensor, condition: Condition) -> Tensor:
        """Call the network with x and the timestep."""
        result: Tensor = self.model(x, noise_input, return_dict=False)[0]
        return result

    @classmethod
    def context_sizes(cls, settings: Mapping[str, Any]) -> ContextSizes:
        """Return no context."""
        return NO_CONTEXT


class UNet2DCondition(DiffusersUNet, Controllable):
    """UNet2DConditionModel, of Stable Diffusion: tokens of the text; for SDXL also a vector, the
    pooled text.

    SDXL reads six numbers more: original height and width, top and left of the crop, and target
    height and width, in pixels. The target is the size of x. The vector ends with four numbers that
    say what differs: see `ResizingConditioner`; zeros stand for an image of the target's size.
    """

    SIZES, RESIZING = 6, 4
    legal: ClassVar = {
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "encoder_hid_dim_type": (None,),
        "addition_embed_type": (None, "text_time"),
        "time_cond_proj_dim": (None,),
    }

    def __init__(self, model: Any, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.control = NoControl()

    @classmethod
    def reads_resizing(cls, settings: Mapping[str, Any]) -> bool:
        """Return whether the network is SDXL's."""
        return settings.get("addition_embed_type") == "text_time"

    def new_control(self, channels: int, factor: int) -> UNetControl:
        """Return a ControlNetModel with the weights of the network's first half."""
        return new_branch(self.model, channels, factor)

    def call(self, x: Tensor, noise_input: Tensor, condition: Condition) -> Tensor:
        """Call the network with x, the timestep, the text and the sizes."""
        added = None
        if condition.vector is not None:
            pooled = condition.vector[:, : -self.RESIZING]
            resizing = condition.vector[:, -self.RESIZING :].to(x)
            height, width = (side * self.image_factor for side in x.shape[2:])
            target = x.new_tensor([[height, width]]).expand(len(x), -1)
            sizes = torch.cat([target + resizing[:, :2], resizing[:, 2:], target], dim=1)
            added = {"text_embeds": pooled, "time_ids": sizes}
        arguments = {"encoder_hidden_states": condition.tokens, "added_cond_kwargs": added}
        control = self.control(x, noise_input, condition.spatial, arguments)
        result: Tensor = self.model(x, noise_input, return_dict=False, **arguments, **control)[0]
        return result

    @classmethod
    def context_sizes(cls, settings: Mapping[str, Any]) -> ContextSizes:
        """Return the channels of the text, and of the pooled text with what says the resizing."""
        vector = 0
        if cls.reads_resizing(settings):
            numbers = cls.SIZES * settings["addition_time_embed_dim"]
            pooled = settings["projection_class_embeddings_input_dim"] - numbers
            vector = pooled + cls.RESIZING
        return ContextSizes(tokens=settings["cross_attention_dim"], vector=vector)
