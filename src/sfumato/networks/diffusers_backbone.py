"""What the networks of diffusers have in common as backbones."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.condition import Condition, ContextSizes
from sfumato.errors import ConfigError
from sfumato.networks.backbone import Backbone
from sfumato.networks.checks import check_inputs, join_maps, pad_inputs
from sfumato.nn.widenable import InputLayer, Widenable


class DiffusersBackbone(Backbone, Widenable):
    """A network of diffusers. Subclasses translate `Condition` into its arguments.

    Attributes:
        model: the network itself.
        settings: its configuration.
        image_factor: side of an image over that of the network's input.
        legal: values of settings that are supported, where others are not.
        usual_side: side of the input where the configuration names none; 0 if it always does.
        input_name: name of the layer that reads x.
    """

    input_name: ClassVar[str] = "pos_embed.proj"
    legal: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    usual_side: ClassVar[int] = 0

    def __init__(
        self,
        model: Any,
        *,
        image_channels: int,
        context: ContextSizes,
        image_factor: int = 1,
        embedded_guidance: float = 1.0,
    ) -> None:
        super().__init__(image_channels=image_channels, context=context)
        self.model, self.image_factor = model, image_factor
        self.settings: Mapping[str, Any] = dict(model.config)
        if self.settings.get("guidance_embeds"):
            self.embedded_guidance = embedded_guidance

    @property
    def multiple(self) -> int:
        """The number that sides of x are padded to a multiple of."""
        return int(self.settings.get("patch_size") or 1)

    @property
    def implementation(self) -> nn.Module:
        """The network of diffusers."""
        model: nn.Module = self.model
        return model

    def forward(self, x: Tensor, noise_input: Tensor, condition: Condition) -> Tensor:
        """Predict the target; x is padded to multiples of `multiple`."""
        check_inputs(
            x,
            condition,
            image_channels=self.image_channels,
            context=self.context,
            where=type(self.model).__name__,
        )
        height, width = x.shape[2:]
        padded, condition = pad_inputs(x, condition, self.multiple)
        if self.reads_maps:
            padded = join_maps(padded, condition)
        output = self.call(padded, noise_input, condition)
        return output[:, : self.image_channels, :height, :width]  # a learned variance is left out

    @abstractmethod
    def call(self, x: Tensor, noise_input: Tensor, condition: Condition) -> Tensor:
        """Call the network with its own arguments; x has its maps concatenated if it reads any."""

    def input_layer(self) -> InputLayer:
        """Return the layer that reads x."""
        return InputLayer(self.model.get_submodule(self.input_name))

    @classmethod
    @abstractmethod
    def context_sizes(cls, settings: Mapping[str, Any]) -> ContextSizes:
        """Return the sizes of the condition that the network reads, from its configuration."""

    @classmethod
    def reads_resizing(cls, settings: Mapping[str, Any]) -> bool:
        """Return whether the network is told how an image was resized and cropped."""
        return False

    @classmethod
    def require_supported(cls, settings: Mapping[str, Any]) -> None:
        """Raise ConfigError, naming the key, if the configuration has a value that is not legal."""
        for key, values in cls.legal.items():
            if key in settings and settings[key] not in values:
                raise ConfigError(
                    f"{settings.get('_class_name', cls.__name__)} with {key} = {settings[key]!r} "
                    "is not supported",
                    where="network",
                    hint=f"supported is {' or '.join(map(json.dumps, values))}",
                )

    @classmethod
    def channels(cls, settings: Mapping[str, Any]) -> int:
        """Return the channels of x, from the configuration."""
        return int(settings.get("in_channels", 3))

    @classmethod
    def channel_settings(cls, image_channels: int) -> dict[str, int]:
        """Return the settings of a network for x of so many channels."""
        return {"in_channels": image_channels, "out_channels": image_channels}


def pack(x: Tensor) -> Tensor:
    """Return latents (B, C, H, W) as tokens of 2 x 2 cells, (B, H W / 4, 4 C)."""
    return F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return tokens (B, H W / 4, 4 C) as latents (B, C, H, W), as `pack` made them."""
    cells = tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2))
    return F.pixel_shuffle(cells, 2)


def cut_padding(condition: Condition) -> Condition:
    """Return the condition without the tokens that are padding in all images of a batch."""
    assert condition.tokens is not None
    assert condition.token_mask is not None
    length = max(1, int(condition.token_mask.sum(1).max()))
    return replace(
        condition,
        tokens=condition.tokens[:, :length],
        token_mask=condition.token_mask[:, :length],
    )
