"""Layers of peft (extra `peft`) inside the layers of a frozen base.

peft puts its own layer in the place of one of the base, and that inside it. Here the base's layer
stays where it is and has peft's inside, which computes with a twin: a module with the parameters of
the base's layer that belongs to no module. So the base keeps its names, and copies share it.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sfumato.adapters.adapter import ChangedLayer
from sfumato.adapters.lora import sharing_tensors
from sfumato.diffusers_library import quiet
from sfumato.errors import CheckpointError, ConfigError
from sfumato.nn.frozen_layers import (
    FrozenConv2d,
    FrozenLinear,
    PackedWeight,
    packed_layers,
    product_dtype,
)

NAME = "default"  # of the adapter inside peft's layers; files do not have it


class PeftLayer(ChangedLayer):
    """The part that a layer of any type gets.

    Attributes:
        peft: the layer of peft, whose base is a twin of this one.
    """

    added: ClassVar[tuple[str, ...]] = ("peft",)
    peft: Any

    def forward(self, x: Tensor) -> Tensor:
        """Return what peft's layer computes, or the base's alone; in the precision of the base."""
        result: Tensor = self.peft(x) if self.adapted else super().forward(x)
        return result.to(product_dtype(x))  # peft gives that of x, also under autocast

    def delta(self) -> Tensor:
        """Return the change of the layer's weight, of its shape: peft's own merging in float64."""
        base = _plain(self.peft.base_layer).double()
        before = base.weight.detach().clone()
        part = copy.deepcopy(self.peft, {id(self.peft.base_layer): base}).double()
        with torch.no_grad():
            part.merge()
        change: Tensor = base.weight.detach() - before
        return change.float()


class PeftLinear(PeftLayer, nn.Linear):
    """A linear layer with one of peft."""


class PeftConv2d(PeftLayer, nn.Conv2d):
    """A convolution with one of peft."""


class PeftFrozenLinear(PeftLayer, FrozenLinear):
    """The same for a weight that is stored in fewer bits; what is trained is float32."""


class PeftFrozenConv2d(PeftLayer, FrozenConv2d):
    """The same for a weight that is stored in fewer bits; what is trained is float32."""


# the class of a layer with one of peft, by that before; and the classes that peft is shown
LINEAR: dict[type[nn.Module], type[PeftLayer]] = {
    nn.Linear: PeftLinear,
    FrozenLinear: PeftFrozenLinear,
}
ADAPTED = LINEAR | {nn.Conv2d: PeftConv2d, FrozenConv2d: PeftFrozenConv2d}
PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    FrozenLinear: nn.Linear,
    FrozenConv2d: nn.Conv2d,
}


def import_peft() -> Any:
    """Import peft, without its notices.

    Raises:
        ConfigError: if it is not installed.
    """
    with quiet():
        try:
            return importlib.import_module("peft")
        except ImportError:
            raise ConfigError(
                "OFT, LoKr and DoRA need peft",
                where="adapter.kind",
                hint="pip install 'sfumato[peft]'",
            ) from None


def adapt(layers: Sequence[Any], config: Any) -> None:
    """Put a layer of peft into each of some layers, in place.

    Args:
        config: of peft, whose targets are numbers.
    """
    plain = nn.ModuleDict({str(number): _plain(layer) for number, layer in enumerate(layers)})
    with quiet():  # what peft would warn of, the adapters' `remarks` say
        import_peft().inject_adapter_in_model(config, plain, adapter_name=NAME)
    for layer, part in zip(layers, plain.values(), strict=True):
        del part.base_layer
        # not by setattr, which would make it a child
        part.__dict__["base_layer"] = _twin(layer)
        layer.__class__ = ADAPTED[type(layer)]
        layer.peft = part


def _twin(layer: nn.Module) -> Any:
    """Return a module of a layer's class whose parameters are the layer's own, also in copies."""
    twin = copy.copy(layer)
    # no hooks and no children, and the same dictionary of parameters
    twin.__dict__ |= nn.Module().__dict__ | {"_parameters": layer._parameters}
    return twin


def _plain(layer: nn.Module) -> Any:
    """Return a layer with the values of another, in float32, of a class that peft knows."""
    twin = _twin(layer)
    weight = twin.dense() if isinstance(twin, PackedWeight) else twin.weight
    twin.__class__ = PLAIN.get(type(twin), type(twin))
    twin._parameters = {
        name: None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
        for name, tensor in (("weight", weight), ("bias", twin.bias))
    }
    return twin


def peft_layers(module: nn.Module) -> dict[str, PeftLayer]:
    """Return the layers of a module that have one of peft, by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, PeftLayer)}


def bare(network: nn.Module) -> Any:
    """Return a network without peft's layers; it shares all tensors with the one that has them."""
    result = sharing_tensors(network)
    for layer in peft_layers(result).values():
        remove_peft(layer)
    return result


def remove_peft(layer: PeftLayer) -> None:
    """Leave the base's layer alone, in place."""
    kind = type(layer.peft.base_layer)
    del layer.peft
    layer.__class__ = kind


def load_into_peft(layer: PeftLayer, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Load tensors into peft's part of a layer.

    Args:
        tensors: by the end of their names in a file, such as lora_A.weight.
    Raises:
        CheckpointError: if they are not those that it has.
    """
    state = {}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        rest = "weight" if first == "lora_magnitude_vector" else rest
        state[f"{first}.{NAME}{'.' * bool(rest)}{rest}"] = tensor
    try:
        layer.peft.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"does not fit: {' '.join(str(error).split())[:300]}",
            where=where,
            hint="it was made for another model, or its configuration belongs to another file",
        ) from None


def _dense(network: nn.Module) -> nn.Module:
    """Turn layers whose weights are stored in fewer bits into ones of float32, in place."""
    for packed in packed_layers(network).values():
        plain = _plain(packed)
        packed.__class__, packed._parameters = type(plain), plain._parameters
    return network


def peft_tensors(network: nn.Module, config: Any) -> dict[str, Tensor]:
    """Return what is trained in a network, by the names that peft gives it in a file.

    Args:
        config: of peft, whose targets are the network's adapted layers.
    Raises:
        CheckpointError: if peft adapts other layers.
    """
    peft, own = import_peft(), peft_layers(network)
    with quiet():
        theirs = peft.inject_adapter_in_model(config, _dense(bare(network)), adapter_name=NAME)
    parts = dict(theirs.named_modules())
    for name, layer in own.items():
        result = parts[name].load_state_dict(layer.peft.state_dict(), strict=False)
        if result.unexpected_keys:
            raise CheckpointError(f"peft has no {result.unexpected_keys[0]}", where=name)
    tensors: Mapping[str, Tensor] = peft.get_peft_model_state_dict(theirs, adapter_name=NAME)
    if len(tensors) != sum(len(layer.peft.state_dict()) for layer in own.values()):
        raise CheckpointError("peft adapts other layers than the run", where="lora-peft")
    return {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}


def opened_by_peft(network: nn.Module, folder: Path) -> Any:
    """Return the base of a network as peft adapts it by a folder of adapter_config.json."""
    with quiet():
        model = import_peft().PeftModel.from_pretrained(_dense(bare(network)), folder)
    return model.base_model.model.eval()
