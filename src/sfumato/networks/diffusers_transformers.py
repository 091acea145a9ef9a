"""Transformers of diffusers as backbones: each says what its network expects and returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sfumato.condition import Condition, ContextSizes
from sfumato.errors import ConfigError
from sfumato.networks.diffusers_backbone import DiffusersBackbone, cut_padding, pack, unpack
from sfumato.nn.widenable import InputLayer


class SD3Transformer(DiffusersBackbone):
    """SD3Transformer2DModel, of Stable Diffusion 3: tokens, and a vector of the pooled text; the
    noise input is the time of the linear path.
    """

    def call(self, x: Tensor, noise_input: Tensor, condition: Condition) -> Tensor:
        """Call the network with x, 1000 times the time, and the text."""
        result: Tensor = self.model(
            hidden_states=x,
            timestep=1000 * noise_input,
            encoder_hidden_states=condition.tokens,
            pooled_projections=condition.vector,
            return_dict=False,
        )[0]
        return result

    @classmethod
    def context_sizes(cls, settings: Mapping[str, Any]) -> ContextSizes:
        """Return the channels of the text and of the pooled text."""
        return ContextSizes(
            tokens=settings["joint_attention_dim"], vector=settings["pooled_projection_dim"]
        )


class PixArtTransformer(DiffusersBackbone):
    """PixArtTransformer2DModel, of PixArt-Sigma: tokens with a mask; its learned variance is left
    out.
    """

    legal: ClassVar = {"use_additional_conditions": (False, None)}

    def call(self, x: Tensor, noise_input: Tensor, condition: Condition) -> Tensor:
        """Call the network with x, the timestep, the text and its mask."""
        assert condition.token_mask is not None
        result: Tensor = self.model(
            x,
            encoder_hidden_states=condition.tokens,
            encoder_attention_mask=condition.token_mask.to(x.dtype),
            timestep=noise_input,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return result

    @classmethod
    def context_sizes(cls, settings: Mapping[str, Any]) -> ContextSizes:
        """Return the channels of the text."""
        return ContextSizes(tokens=settings["caption_channels"])


class DiTTransformer(DiffusersBackbone):
    """DiTTransformer2DModel, of DiT: a vector of one value, the number of the class; its learned
    variance is left out.
    """

    legal: ClassVar = {"norm_type": ("ada_norm_zero",)}

    def __init__(self, model: Any, **settings: Any) -> None:
        super().__init__(model, **settings)
        for block in model.transformer_blocks:
            # in training, it would hide classes a second time, and by draws that have no seed
            block.norm1.emb.class_embedder.dropout_prob = 0.0

    def call(self, x: Tensor, noise_input: Tensor, condition: Condition) -> Tensor:
        """Call the network with x, the timestep and the class."""
        assert condition.vector is not None
        classes = condition.vector[:, 0]
        if not bool((classes == classes.round()).all()):
            raise ConfigError(
                "the classes of this model cannot be mixed: they are numbers",
                where="sample",
                hint="interpolate between seeds of one category",
            )
        result: Tensor = self.model(
            x,
            timestep=noise_input,
            class_labels=classes.long(),
            return_dict=False,
        )[0]
        return result

    @classmethod
    def context_sizes(cls, settings: Mapping[str, Any]) -> ContextSizes:
        """Return a vector of one value."""
        return ContextSizes(vector=1)


class FluxTransformer(DiffusersBackbone):
    """FluxTransformer2DModel, of FLUX.1: tokens, and a vector of the pooled text; cells of 2 x 2
    latents are tokens of the image, and distilled networks are told a guidance scale.
    """

    input_name = "x_embedder"
    usual_side = 128

    @property
    def multiple(self) -> int:
        """2, the side of a cell."""
        return 2

    def call(self, x: Tensor, noise_input: Tensor, condition: Condition) -> Tensor:
        """Call the network with packed latents, the time, the text and the places of tokens."""
        assert condition.tokens is not None
        height, width = x.shape[2:]
        guidance = None
        if self.embedded_guidance is not None:
            guidance = torch.full((len(x),), self.embedded_guidance, device=x.device)
        result: Tensor = self.model(
            hidden_states=pack(x),
            timestep=noise_input,
            guidance=guidance,
            pooled_projections=condition.vector,
            encoder_hidden_states=condition.tokens,
            txt_ids=x.new_zeros(condition.tokens.shape[1], 3),
            img_ids=_places(height // 2, width // 2).to(x),
            return_dict=False,
        )[0]
        return unpack(result, height, width)

    @classmethod
    def context_sizes(cls, settings: Mapping[str, Any]) -> ContextSizes:
        """Return the channels of the text and of the pooled text."""
        return ContextSizes(
            tokens=settings["joint_attention_dim"], vector=settings["pooled_projection_dim"]
        )

    @classmethod
    def channels(cls, settings: Mapping[str, Any]) -> int:
        """Return a quarter of the channels of a token."""
        return int(settings.get("in_channels", 64)) // 4

    @classmethod
    def channel_settings(cls, image_channels: int) -> dict[str, int]:
        """Return the channels of a token."""
        return {"in_channels": 4 * image_channels, "out_channels": 4 * image_channels}


def _places(rows: int, columns: int) -> Tensor:
    """Return (0, row, column) of each cell, (rows columns, 3)."""
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).reshape(-1, 2)
    return torch.cat([torch.zeros_like(places[:, :1]), places], dim=1)


class SanaTransformer(DiffusersBackbone):
    """SanaTransformer2DModel, of Sana: tokens with a mask; the noise input is the time of the
    linear path.
    """

    input_name = "patch_embed.proj"
    legal: ClassVar = {"guidance_embeds": (False, None)}

    def call(self, x: Tensor, noise_input: Tensor, condition: Condition) -> Tensor:
        """Call the network with x, its own multiple of 1000 times the time, the text and its mask."""
        assert condition.token_mask is not None
        result: Tensor = self.model(
            x,
            encoder_hidden_states=condition.tokens,
            encoder_attention_mask=condition.token_mask.to(x.dtype),
            timestep=1000 * noise_input * float(self.settings.get("timestep_scale", 1.0)),
            return_dict=False,
        )[0]
        return result

    @classmethod
    def context_sizes(cls, settings: Mapping[str, Any]) -> ContextSizes:
        """Return the channels of the text."""
        return ContextSizes(tokens=settings["caption_channels"])


class Lumina2Transformer(DiffusersBackbone):
    """Lumina2Transformer2DModel, of Lumina-Image 2: tokens with a mask; it is told the share of data
    and predicts data minus noise.
    """

    input_name = "x_embedder"

    def input_layer(self) -> InputLayer:
        """Return the layer that reads x; its tokens are pixels, each with all its channels."""
        return replace(super().input_layer(), pixels=self.multiple**2)

    def call(self, x: Tensor, noise_input: Tensor, condition: Condition) -> Tensor:
        """Call the network with x, one minus the time, the text and its mask; negate the output."""
        condition = cut_padding(condition)
        result: Tensor = self.model(
            hidden_states=x,
            timestep=1 - noise_input,
            encoder_hidden_states=condition.tokens,
            encoder_attention_mask=condition.token_mask,
            return_dict=False,
        )[0]
        return -result

    @classmethod
    def context_sizes(cls, settings: Mapping[str, Any]) -> ContextSizes:
        """Return the channels of the text."""
        return ContextSizes(tokens=settings["cap_feat_dim"])


class ZImageTransformer(DiffusersBackbone):
    """ZImageTransformer2DModel, of Z-Image: tokens with a mask; it reads lists, is told the share of
    data and predicts data minus noise.
    """

    input_name = "all_x_embedder.2-1"
    legal: ClassVar = {
        "siglip_feat_dim": (None,),
        "all_patch_size": ([2], (2,)),
        "all_f_patch_size": ([1], (1,)),
    }
    usual_side = 128

    @property
    def multiple(self) -> int:
        """2, the side of a patch."""
        return 2

    def input_layer(self) -> InputLayer:
        """Return the layer that reads x; its tokens are pixels, each with all its channels."""
        return replace(super().input_layer(), pixels=self.multiple**2)

    def call(self, x: Tensor, noise_input: Tensor, condition: Condition) -> Tensor:
        """Call the network with images and texts one by one; negate the output."""
        assert condition.tokens is not None
        assert condition.token_mask is not None
        texts = [
            row[valid] for row, valid in zip(condition.tokens, condition.token_mask, strict=True)
        ]
        images = list(x.unsqueeze(2).unbind(0))
        result = self.model(images, 1 - noise_input, texts, return_dict=False)[0]
        return -torch.stack(list(result)).squeeze(2)

    @classmethod
    def context_sizes(cls, settings: Mapping[str, Any]) -> ContextSizes:
        """Return the channels of the text."""
        return ContextSizes(tokens=settings["cap_feat_dim"])

    @classmethod
    def channel_settings(cls, image_channels: int) -> dict[str, int]:
        """Return the channels of x, which are those of the output too."""
        return {"in_channels": image_channels}


class QwenImageTransformer(DiffusersBackbone):
    """QwenImageTransformer2DModel, of Qwen-Image: tokens with a mask; cells of 2 x 2 latents are
    tokens of the image.
    """

    input_name = "img_in"
    legal: ClassVar = {
        "guidance_embeds": (False, None),
        "zero_cond_t": (False, None),
        "use_additional_t_cond": (False, None),
        "use_layer3d_rope": (False, None),
    }
    usual_side = 128

    def call(self, x: Tensor, noise_input: Tensor, condition: Condition) -> Tensor:
        """Call the network with packed latents, the time, the text and its mask."""
        condition = cut_padding(condition)
        height, width = x.shape[2:]
        result: Tensor = self.model(
            hidden_states=pack(x),
            timestep=noise_input,
            encoder_hidden_states=condition.tokens,
            encoder_hidden_states_mask=condition.token_mask,
            img_shapes=[[(1, height // 2, width // 2)]] * len(x),
            return_dict=False,
        )[0]
        return unpack(result, height, width)

    @classmethod
    def context_sizes(cls, settings: Mapping[str, Any]) -> ContextSizes:
        """Return the channels of the text."""
        return ContextSizes(tokens=settings["joint_attention_dim"])

    @classmethod
    def channels(cls, settings: Mapping[str, Any]) -> int:
        """Return a quarter of the channels of a token."""
        return int(settings.get("in_channels", 64)) // 4

    @classmethod
    def channel_settings(cls, image_channels: int) -> dict[str, int]:
        """Return the channels of a token, and those of the latents."""
        return {"in_channels": 4 * image_channels, "out_channels": image_channels}
