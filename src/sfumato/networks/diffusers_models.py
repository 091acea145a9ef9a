"""Networks that diffusers implements, as backbones (extra `diffusers`).

A table names every class that can be used. Classes are looked up in it, so that a file never
chooses what is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from sfumato.condition import NO_CONTEXT, ContextSizes
from sfumato.config.bounds import Finite, Size
from sfumato.diffusers_library import import_diffusers, quiet
from sfumato.errors import ConfigError, closest
from sfumato.networks.backbone import Backbone, NetworkConfig
from sfumato.networks.diffusers_backbone import DiffusersBackbone
from sfumato.networks.diffusers_transformers import (
    DiTTransformer,
    FluxTransformer,
    Lumina2Transformer,
    PixArtTransformer,
    QwenImageTransformer,
    SanaTransformer,
    SD3Transformer,
    ZImageTransformer,
)
from sfumato.networks.diffusers_unets import UNet2D, UNet2DCondition
from sfumato.networks.diffusers_weights import load_weights, parameters_on_meta
from sfumato.nn.frozen_layers import Storage, pack_layers

FAMILIES: dict[str, type[DiffusersBackbone]] = {
    "UNet2DModel": UNet2D,
    "UNet2DConditionModel": UNet2DCondition,
    "SD3Transformer2DModel": SD3Transformer,
    "PixArtTransformer2DModel": PixArtTransformer,
    "DiTTransformer2DModel": DiTTransformer,
    "FluxTransformer2DModel": FluxTransformer,
    "SanaTransformer2DModel": SanaTransformer,
    "Lumina2Transformer2DModel": Lumina2Transformer,
    "ZImageTransformer2DModel": ZImageTransformer,
    "QwenImageTransformer2DModel": QwenImageTransformer,
}

# names of layers that are never stored in fewer bits: they are small, the noise level passes
# through some, and diffusers reads the precision of a network from others
PRECISE = ("embed", "conv_in", "conv_out")


@dataclass(frozen=True, kw_only=True)
class DiffusersConfig(NetworkConfig):
    """A network of diffusers, from scratch or with the weights of a folder (extra `diffusers`).

    Attributes:
        architecture: name of its class.
        settings: configuration of the class, as in its config.json; keys that are missing have the
            class's defaults.
        path: folder with the weights to start from; "" for random ones.
        image_factor: side of an image over that of the network's input, for networks that are told
            the image's size.
        variant: which weights, where the folder has several: "fp16" for *.fp16.safetensors.
        embedded_guidance: guidance scale that distilled networks are told (FLUX.1 dev); it costs
            nothing, unlike that of sampling.
        activation_checkpointing: whether activations inside blocks are recomputed in the backward
            pass, instead of stored: one more forward pass, less memory.
        base_dtype: what the frozen weights under an adapter are stored in; what is trained is
            float32, and products are computed in `precision`. bfloat16 takes half of the memory.
            int8 takes a quarter for linear layers and half for convolutions. Norms, embeddings
            and the layers of input and output stay in float32.
    """

    kind: ClassVar[str] = "diffusers"

    architecture: str = "UNet2DModel"
    settings: dict[str, Any] = field(default_factory=dict)
    path: str = ""
    image_factor: Size = 1
    variant: str = ""
    embedded_guidance: Finite = 3.5
    activation_checkpointing: bool = False
    base_dtype: Storage = "float32"

    def from_scratch(self) -> DiffusersConfig:
        """Return the same network with random weights."""
        return replace(self, path="")

    @property
    def origin(self) -> str:
        """The folder of the weights."""
        return self.path

    @property
    def frozen_in(self) -> str:
        """What weights are stored in that cannot be trained."""
        return "" if self.base_dtype == "float32" else self.base_dtype

    def build(self, *, image_channels: int, context: ContextSizes = NO_CONTEXT) -> Backbone:
        """Build the network, and load its weights if `path` is set.

        Raises:
            ConfigError: for an unknown architecture, settings that it does not take, or channels
                that do not fit.
            CheckpointError: if the weights cannot be read or do not fit.
        """
        family = require_family(self.architecture)
        family.require_supported({"_class_name": self.architecture, **self.settings})
        with parameters_on_meta() if self.path else nullcontext():
            model = _model(self.architecture, self.settings, image_channels)
        settings = dict(model.config)
        sizes, channels = family.context_sizes(settings), family.channels(settings)
        if channels != image_channels:
            raise ConfigError(
                f"{self.architecture} reads {channels} channels, and the data have "
                f"{image_channels}",
                where="network.settings.in_channels",
                hint="networks for inpainting and editing read more than they predict, which is "
                "not supported",
            )
        if context != sizes:
            raise ConfigError(
                f"{self.architecture} reads {sizes}, and the conditioner gives {context}",
                where="conditioner",
                hint=_how_to_fit(context, sizes)
                + (", with conditioner.resizing={}" if family.reads_resizing(settings) else ""),
            )
        pack_layers(model, self.base_dtype, precise=PRECISE)
        if self.path:
            load_weights(model, Path(self.path), variant=self.variant)
        if self.activation_checkpointing:
            model.enable_gradient_checkpointing()
        return family(
            model,
            image_channels=image_channels,
            context=sizes,
            image_factor=self.image_factor,
            embedded_guidance=self.embedded_guidance,
        )


def require_family(architecture: str) -> type[DiffusersBackbone]:
    """Return the backbone of a class of diffusers.

    Raises:
        ConfigError: for a class that is not in the table.
    """
    if architecture not in FAMILIES:
        raise ConfigError(
            f"unsupported network class {architecture!r}",
            where="network.architecture",
            hint=f"{closest(architecture, FAMILIES)}supported are {', '.join(FAMILIES)}",
        )
    return FAMILIES[architecture]


def _model(architecture: str, settings: Mapping[str, Any], image_channels: int) -> Any:
    """Build the untrained network."""
    diffusers = import_diffusers(architecture, where="network")
    channels = FAMILIES[architecture].channel_settings(image_channels)
    known = {key: value for key, value in settings.items() if not key.startswith("_")}
    try:
        with quiet():
            return getattr(diffusers, architecture)(**{**channels, **known})
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
        raise ConfigError(
            f"{architecture} cannot be built: {str(error)[:300]}",
            where="network.settings",
            hint="the keys are those of its config.json in diffusers",
        ) from None


def _how_to_fit(given: ContextSizes, read: ContextSizes) -> str:
    """Return which settings to change, where a network reads another context than is given."""
    unread = {
        "vector": "conditioner.category=null conditioner.attributes=null data.augment.karras=0",
        "tokens": "conditioner.text=null",
        "spatial": "conditioner.doodle=null conditioner.points=null conditioner.image=null",
    }
    settings = [
        text for name, text in unread.items() if getattr(given, name) and not getattr(read, name)
    ]
    if settings:
        return f"set what the network cannot read to nothing: {' '.join(settings)}"
    return "use the conditioner that belongs to the network"
