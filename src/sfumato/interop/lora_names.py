"""Names of layers in LoRA files, of all programs that write them.

A file names a layer by its path in diffusers, or by its path in the network's original code
(Stability's for Stable Diffusion, Black Forest Labs' for Flux), where one projection may be several
of diffusers' side by side. Dots may be underscores, and prefixes say what the layer belongs to.
All of them are looked up in one table, in which dots are underscores.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cached_property

from torch import nn

from sfumato.adapters import adaptable_layers
from sfumato.interop.original_names import ORIGINALS, Piece, Shapes, stability_names

UNETS = ("UNet", "UNet2DModel", "UNet2DConditionModel")
TEXT_ENCODERS = {
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
}
PREFIXES = (
    *TEXT_ENCODERS,
    "base_model.model.",
    "_orig_mod.",
    "module.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
NEUTRAL = ("base_model.model.", "_orig_mod.", "module.")  # say nothing of the part
TEXT_LAYERS = ("text_model", "encoder")  # how names in a text encoder begin
CLIP_LAYER = re.compile(r"encoder\.layers\.")


Table = Mapping[str, tuple[Piece, ...]]  # what names stand for, with underscores for dots


def underscored(name: str) -> str:
    """Return a path as kohya's files spell it."""
    return name.replace(".", "_")


def part_of(network: nn.Module) -> str:
    """Return what files call a network: "unet", or "transformer" for all others.

    Our own U-Net and DiT are called so too.
    """
    return "unet" if type(network).__name__ in UNETS else "transformer"


def is_sdxl(layers: Mapping[str, object]) -> bool:
    """Return whether a U-Net has the layers by which SDXL reads sizes and pooled text."""
    return "add_embedding.linear_1" in layers


def with_text_model(layer: str) -> str:
    """Return the name of a layer of a CLIP text model as files spell it, with `text_model.`.

    Newer versions of transformers have left this prefix out, which other programs do not know.
    """
    return f"text_model.{layer}" if CLIP_LAYER.match(layer) else layer


class LayerNames:
    """All names by which files may call the layers of a model.

    Attributes:
        network: the part that is the network.
    """

    def __init__(
        self, network: nn.Module, texts: Callable[[], Mapping[str, nn.Module]] = dict
    ) -> None:
        """Collect the names of a network and of the text encoders that belong to it.

        Args:
            texts: returns the encoders by the part's name, such as text_encoder_2; called when a
                file has a name of theirs.
        """
        self.network, self._texts = part_of(network), texts
        shapes = _shapes(network)
        self._own = (shapes, _network_names(type(network).__name__, self.network, shapes))

    @cached_property
    def _encoders(self) -> dict[str, tuple[Shapes, Table]]:
        parts: dict[str, tuple[Shapes, Table]] = {}
        for part, module in self._texts().items():
            shapes = _shapes(module)
            table = {
                underscored(spelled): (Piece(part, layer),)
                for layer in shapes
                for spelled in (layer, with_text_model(layer), layer.removeprefix("text_model."))
            }
            parts[part] = (shapes, table)
        return parts

    def _part(self, name: str) -> tuple[Shapes, Table]:
        return self._own if name == self.network else self._encoders.get(name, ({}, {}))

    def shapes(self, part: str) -> Shapes:
        """Return the shapes of a part's weights, by layer; {} for a part that is not there."""
        return self._part(part)[0]

    def find(self, name: str, part: str = "") -> tuple[tuple[Piece, ...], str]:
        """Return what a name in a file stands for, and the name without its prefixes.

        The first is () for a name that no layer has.

        Args:
            part: whose layers have no prefix; "" if that is not known.
        """
        while True:
            # without a prefix, a name is the network's, or the first text encoder's
            place = part or ("text_encoder" if name.startswith(TEXT_LAYERS) else self.network)
            if found := self._part(place)[1].get(underscored(name)):
                return found, name
            prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
            if prefix is None:
                return (), name
            name = name.removeprefix(prefix)
            if not part and prefix not in NEUTRAL:
                part = TEXT_ENCODERS.get(prefix, self.network)


def _shapes(module: nn.Module) -> Shapes:
    return {name: layer.weight.shape for name, layer in adaptable_layers(module).items()}


def _network_names(architecture: str, part: str, shapes: Shapes) -> Table:
    names: dict[str, tuple[Piece, ...]] = {layer: (Piece(part, layer),) for layer in shapes}
    if architecture == "UNet2DConditionModel":
        names |= {theirs: names[layer] for layer, theirs in stability_names(shapes).items()}
    if architecture in ORIGINALS:
        names |= ORIGINALS[architecture].pieces(shapes, part)
    return {underscored(name): pieces for name, pieces in names.items()}
