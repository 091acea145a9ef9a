"""Folders of peft with OFT, LoKr or DoRA, read as changes of a model's layers.

What such a change is depends on the layer's own weight, and peft computes it. It is added as a
product of full rank, so that several add up and have strengths, as LoRAs do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.adapters import (
    OFT,
    DoRA,
    Factors,
    LoKr,
    PeftAdapter,
    add_product,
    bare,
    load_into_peft,
    peft_layers,
    remove_peft,
)
from sfumato.errors import CheckpointError, ConfigError
from sfumato.interop.lora_files import PEFT_CONFIG, PEFT_FILE, ReadLoRA
from sfumato.interop.lora_names import LayerNames
from sfumato.interop.safetensors_files import read_safetensors

TENSOR = re.compile(
    r"(?P<layer>.+)\.(?P<tensor>oft_R\.weight|lokr_\w+|lora_[AB]\.weight|lora_magnitude_vector)"
)
# settings of adapter_config.json that change what the tensors mean, and the values that are read
READ: dict[str, dict[str, Any]] = {
    "OFT": {
        "coft": False,
        "block_share": False,
        "use_cayley_neumann": True,
        "num_cayley_neumann_terms": 5,
        "r": 0,
        "fan_in_fan_out": False,
    },
    "LOKR": {
        "use_effective_conv2d": False,
        "decompose_both": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    },
    "DORA": {
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "fan_in_fan_out": False,
        "lora_bias": False,
        "layer_replication": None,
        "target_parameters": None,
        "init_lora_weights": True,
    },
}
NOTHING: tuple[Any, ...] = (
    None,
    False,
    [],
    {},
    "none",
)  # values of `bias` and `modules_to_save` that add nothing


def read_kind(path: Path, network: nn.Module, names: LayerNames) -> ReadLoRA | None:
    """Read a folder of peft, or its file, if it is of one of these kinds; None for others.

    Args:
        network: that it is for, without layers of peft.
        names: of its layers.
    Raises:
        CheckpointError: if it has settings that are not supported, or does not fit the network.
        ConfigError: if peft is not installed.
    """
    folder = path.parent if path.name == PEFT_FILE else path
    try:
        values = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
        kind = values["peft_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # the reader of LoRAs says what is wrong
    kind = "DORA" if kind == "LORA" and values.get("use_dora") else kind
    file = folder / PEFT_FILE
    if kind not in READ or not file.is_file():
        return None
    tensors, header = read_safetensors(file)
    layers = _by_layer(file, tensors, names)
    adapter = _adapter(kind, values, folder, list(layers))
    adapter.require_packages()
    adapted = bare(network)
    try:
        adapter.apply(adapted, nn.Identity())
    except ConfigError as error:
        raise CheckpointError(error.what, where=str(file), hint="open it with peft") from None
    for layer, part in peft_layers(adapted).items():
        load_into_peft(part, layers.pop(layer), where=f"{file}: {layer}")
    if layers:
        raise CheckpointError(
            f"peft cannot change {next(iter(layers))} so",
            where=str(file),
            hint="it was made for another model",
        )
    changes = {name: exact(part.delta()) for name, part in peft_layers(adapted).items()}
    remark = f"{folder.name}: {adapter.described} on {len(changes)} layers, as peft computes it"
    return ReadLoRA(changes={names.network: changes}, remarks=(remark,), header=header)


def _by_layer(
    file: Path, tensors: Mapping[str, Tensor], names: LayerNames
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors by the network's layer, and by peft's name in it."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = TENSOR.fullmatch(key)
        pieces = names.find(match["layer"])[0] if match else ()
        if match is None or len(pieces) != 1 or pieces[0].part != names.network:
            raise CheckpointError(
                f"{key} belongs to no layer of the network",
                where=str(file),
                hint="it was made for another model, or changes parts that are not supported",
            )
        layers.setdefault(pieces[0].layer, {})[match["tensor"]] = tensor.float()
    return layers


def _adapter(kind: str, values: Mapping[str, Any], folder: Path, layers: list[str]) -> PeftAdapter:
    """Return the adapter of some layers that a configuration describes.

    Raises:
        CheckpointError: for settings that are not supported.
    """
    where = str(folder / PEFT_CONFIG)
    for key, read in READ[kind].items():
        if values.get(key, read) != read:
            raise CheckpointError(
                f"{key} = {values[key]!r}, which is not supported",
                where=where,
                hint="open it with peft itself",
            )
    for key in ("bias", "modules_to_save"):
        if values.get(key) not in NOTHING:
            raise CheckpointError(f"{key} = {values[key]!r}, which is not supported", where=where)
    chosen: dict[str, Any] = {
        "layers": (f"^({'|'.join(map(re.escape, layers))})$",),
        "convolutions": True,
    }
    try:
        if kind == "OFT":
            return OFT(block_size=int(values["oft_block_size"]), **chosen)
        if kind == "LOKR":
            factor = int(values.get("decompose_factor", -1))
            return LoKr(
                rank=int(values["r"]),
                alpha=float(values["alpha"]),
                factor=None if factor == -1 else factor,
                **chosen,
            )
        return DoRA(rank=int(values["r"]), alpha=float(values["lora_alpha"]), **chosen)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"cannot be understood: {error}", where=where, hint="download it again"
        ) from None


def exact(change: Tensor) -> Factors:
    """Return a change as a product of full rank, one of whose factors is an identity."""
    outputs, ones = len(change), [1] * (change.ndim - 2)
    matrix = change.flatten(1)
    if outputs <= matrix.shape[1]:
        return Factors(change, torch.eye(outputs, device=change.device).view(outputs, -1, *ones))
    rank = matrix.shape[1]
    identity = torch.eye(rank, device=change.device).view(rank, *change.shape[1:])
    return Factors(identity, matrix.view(outputs, rank, *ones))


def as_products_in_place(network: nn.Module) -> None:
    """Turn what peft computes in a network into products, to which others can be added."""
    for layer in peft_layers(network).values():
        factors = exact(layer.delta())
        remove_peft(layer)
        add_product(layer, factors)
