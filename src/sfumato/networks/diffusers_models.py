"""Networks that diffusers implements, as backbones: what each expects and returns is said here and
nowhere else (extra `diffusers`).

A table names every class that can be used. Classes are looked up in it, so that a file never
chooses what is imported.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sfumato.condition import NO_CONTEXT, Condition, ContextSizes
from sfumato.config.bounds import Size
from sfumato.diffusers_library import import_diffusers, quiet
from sfumato.errors import CheckpointError, ConfigError, closest
from sfumato.networks.backbone import Backbone, NetworkConfig
from sfumato.networks.checks import check_inputs, pad_inputs

WEIGHTS = "diffusion_pytorch_model"


class DiffusersBackbone(Backbone):
    """A network of diffusers. Subclasses translate `Condition` into its arguments.

    Attributes:
        model: the network itself.
        settings: its configuration.
        image_factor: side of an image over that of the network's input.
    """

    def __init__(
        self, model: Any, *, image_channels: int, context: ContextSizes, image_factor: int = 1
    ) -> None:
        super().__init__(image_channels=image_channels, context=context)
        self.model, self.image_factor = model, image_factor
        self.settings: Mapping[str, Any] = dict(model.config)

    @property
    def multiple(self) -> int:
        """The factor by which the network downsamples."""
        blocks = self.settings.get("down_block_types")
        return int(2 ** (len(blocks) - 1)) if blocks else int(self.settings.get("patch_size", 1))

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
        output = self.call(padded, noise_input, condition)
        return output[:, : self.image_channels, :height, :width]  # a learned variance is left out

    @abstractmethod
    def call(self, x: Tensor, noise_input: Tensor, condition: Condition) -> Tensor:
        """Call the network with its own arguments."""

    @classmethod
    @abstractmethod
    def context_sizes(cls, settings: Mapping[str, Any]) -> ContextSizes:
        """Return the sizes of the condition that the network reads, from its configuration."""


class UNet2D(DiffusersBackbone):
    """UNet2DModel, of DDPM: unconditional."""

    def call(self, x: Tensor, noise_input: Tensor, condition: Condition) -> Tensor:
        """Call the network with x and the timestep."""
        result: Tensor = self.model(x, noise_input, return_dict=False)[0]
        return result

    @classmethod
    def context_sizes(cls, settings: Mapping[str, Any]) -> ContextSizes:
        """Return no context."""
        if settings.get("class_embed_type") is not None or settings.get("num_class_embeds"):
            raise ConfigError(
                "UNet2DModel with class embeddings is not supported",
                where="network",
                hint="use one without class_embed_type and num_class_embeds",
            )
        return NO_CONTEXT


class UNet2DCondition(DiffusersBackbone):
    """UNet2DConditionModel, of Stable Diffusion: tokens of the text; for SDXL also a vector, the
    pooled text.

    SDXL reads six numbers more: original height and width, top and left of the crop, and target
    height and width, in pixels. They are those of an image that is not cropped.
    """

    SIZES = 6

    def call(self, x: Tensor, noise_input: Tensor, condition: Condition) -> Tensor:
        """Call the network with x, the timestep, the text and the sizes."""
        added = None
        if condition.vector is not None:
            height, width = (side * self.image_factor for side in x.shape[2:])
            sizes = x.new_tensor([[height, width, 0, 0, height, width]]).expand(len(x), -1)
            added = {"text_embeds": condition.vector, "time_ids": sizes}
        result: Tensor = self.model(
            x,
            noise_input,
            encoder_hidden_states=condition.tokens,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return result

    @classmethod
    def context_sizes(cls, settings: Mapping[str, Any]) -> ContextSizes:
        """Return the channels of the text, and of the pooled text."""
        unsupported = {
            "class_embed_type": (None,),
            "num_class_embeds": (None,),
            "encoder_hid_dim_type": (None,),
            "addition_embed_type": (None, "text_time"),
        }
        for key, legal in unsupported.items():
            if settings.get(key) not in legal:
                raise ConfigError(
                    f"UNet2DConditionModel with {key} = {settings[key]!r} is not supported",
                    where="network",
                    hint="supported are Stable Diffusion 1, 2 and XL",
                )
        vector = 0
        if settings.get("addition_embed_type") == "text_time":
            numbers = cls.SIZES * settings["addition_time_embed_dim"]
            vector = settings["projection_class_embeddings_input_dim"] - numbers
        return ContextSizes(tokens=settings["cross_attention_dim"], vector=vector)


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
        if settings.get("use_additional_conditions"):
            raise ConfigError(
                "PixArtTransformer2DModel with use_additional_conditions is not supported",
                where="network",
                hint="supported is PixArt-Sigma",
            )
        return ContextSizes(tokens=settings["caption_channels"])


FAMILIES: dict[str, type[DiffusersBackbone]] = {
    "UNet2DModel": UNet2D,
    "UNet2DConditionModel": UNet2DCondition,
    "SD3Transformer2DModel": SD3Transformer,
    "PixArtTransformer2DModel": PixArtTransformer,
}


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
    """

    kind: ClassVar[str] = "diffusers"

    architecture: str = "UNet2DModel"
    settings: dict[str, Any] = field(default_factory=dict)
    path: str = ""
    image_factor: Size = 1
    variant: str = ""

    @property
    def is_pretrained(self) -> bool:
        """Whether `path` is set."""
        return bool(self.path)

    def from_scratch(self) -> DiffusersConfig:
        """Return the same network with random weights."""
        return replace(self, path="")

    def build(self, *, image_channels: int, context: ContextSizes = NO_CONTEXT) -> Backbone:
        """Build the network, and load its weights if `path` is set.

        Raises:
            ConfigError: for an unknown architecture, settings that it does not take, or channels
                that do not fit.
            CheckpointError: if the weights cannot be read or do not fit.
        """
        family = require_family(self.architecture)
        model = _model(self.architecture, self.settings, image_channels)
        sizes = family.context_sizes(dict(model.config))
        if int(model.config["in_channels"]) != image_channels:
            raise ConfigError(
                f"{self.architecture} reads {model.config['in_channels']} channels, and the data "
                f"have {image_channels}",
                where="network.settings.in_channels",
                hint="networks for inpainting and editing read more than they predict, which is "
                "not supported",
            )
        if context != sizes:
            raise ConfigError(
                f"{self.architecture} reads {sizes}, and the conditioner gives {context}",
                where="conditioner",
                hint="use the conditioner that belongs to the network",
            )
        if self.path:
            load_weights(model, Path(self.path), variant=self.variant)
        return family(
            model, image_channels=image_channels, context=sizes, image_factor=self.image_factor
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
    channels = {"in_channels": image_channels, "out_channels": image_channels}
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


def load_weights(model: nn.Module, folder: Path, *, variant: str = "") -> None:
    """Load the weights of a folder in diffusers' layout into a model, in float32.

    Raises:
        CheckpointError: naming the file or the tensor that is missing, damaged or does not fit.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder, variant=variant):
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"cannot be read: {error}", where=str(file), hint="download it again"
            ) from None
    expected = model.state_dict()
    missing, unknown = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or unknown:
        raise CheckpointError(
            f"{len(missing)} tensors are missing and {len(unknown)} are unknown, e.g. "
            f"{sorted(missing or unknown)[0]}",
            where=str(folder),
            hint="the weights belong to another config.json",
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{name} has shape {tuple(tensor.shape)}, and the network needs "
                f"{tuple(expected[name].shape)}",
                where=str(folder),
                hint="the weights belong to another config.json",
            )
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{name} has values that are not finite",
                where=str(folder),
                hint="download it again, or use another variant",
            )
    model.load_state_dict(tensors)


def weight_files(folder: Path, *, variant: str = "") -> list[Path]:
    """Return the safetensors files of a folder, one or several shards.

    Without `variant`, a variant is taken where it is the only one.

    Raises:
        CheckpointError: if there are none, a shard is missing, or there are several variants.
    """
    named = f".{variant}" if variant else ""
    plain, sharded = (
        folder / f"{WEIGHTS}{named}.safetensors",
        sorted(folder.glob(f"{WEIGHTS}{named}-*-of-*.safetensors")),
    )
    if plain.is_file():
        return [plain]
    if sharded:
        total = int(sharded[0].stem.rpartition("-of-")[2])
        if len(sharded) != total:
            raise CheckpointError(
                f"{len(sharded)} of {total} shards are there",
                where=str(folder),
                hint="download the missing ones",
            )
        return sharded
    variants = sorted(folder.glob(f"{WEIGHTS}.*.safetensors"))
    if len(variants) == 1 and not variant:
        return variants
    others = sorted(path.name for path in folder.glob(f"{WEIGHTS}*"))
    raise CheckpointError(
        f"has no {plain.name}" + (f" (there are {', '.join(others)})" if others else ""),
        where=str(folder),
        hint="name one with --variant"
        if variants
        else "only .safetensors are read; download the model with its safetensors files",
    )
