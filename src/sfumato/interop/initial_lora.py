"""LoRA files as first values of a LoRA that is trained: its settings, and its values."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from sfumato.adapters import Factors, LoRA, adaptable_layers
from sfumato.conditioners import CompositeConditioner
from sfumato.errors import CheckpointError
from sfumato.interop.lora_files import read_lora
from sfumato.interop.lora_names import LayerNames
from sfumato.networks import Backbone
from sfumato.storage.checkpoint import digest

V = TypeVar("V", int, float)
TEXT_PART = "text_encoder"  # how the names of text encoders begin
ALL = ""  # a pattern that is found in every name
DEPTHS = (1, 2, 3)  # parts at the end of a name that may tell layers apart


@dataclass(frozen=True, kw_only=True)
class InitialLoRA:
    """The first values of a LoRA.

    Attributes:
        adapter: settings that the values have, with their place and their hash.
        factors: of the model's layers, by their names in the backbone, and of its text encoders'
            layers by the encoder's name and theirs in it.
        remarks: what was counted, left out or found in the header.
    """

    adapter: LoRA
    factors: Mapping[str, Factors]
    remarks: tuple[str, ...]


def initial_lora(
    path: Path,
    backbone: Backbone,
    conditioner: CompositeConditioner | None,
    *,
    partial: bool = False,
) -> InitialLoRA:
    """Read a LoRA file that a fine-tuning begins with.

    Args:
        backbone: that it is for, which may be on the meta device.
        conditioner: that it is for, whose text encoders are loaded for a file that changes them; None
            if these are not to be trained.
        partial: whether tensors that fit no layer of the model are left out.
    Raises:
        CheckpointError: as `read_lora`; or if it changes no layer of the network.
    """
    network = backbone.implementation
    trainable = dict if conditioner is None else conditioner.text_layers
    names = LayerNames(
        network, lambda: conditioner.text_encoders() if conditioner and trainable() else {}
    )
    read = read_lora(path, names, partial=partial)
    if names.network not in read.changes:
        raise CheckpointError(
            "changes text encoders only, and no layer of the network that is trained",
            where=str(path),
            hint="use it while sampling: `sfumato sample MODEL --lora FILE`",
        )
    inside = next(name for name, module in backbone.named_modules() if module is network)
    prefix = f"{inside}." if inside else ""
    factors = {f"{prefix}{name}": one for name, one in read.changes[names.network].items()}
    layers: dict[str, nn.Module] = dict(adaptable_layers(backbone))
    remarks = read.remarks
    if len(read.changes) > 1:
        own = trainable()
        texts = {
            f"{part}.{name}": one
            for part, changes in read.changes.items()
            if part != names.network
            for name, one in changes.items()
        }
        if others := sorted(texts.keys() - own.keys()):
            remarks = (*remarks, _left_out(others, path, partial=partial))
        factors |= {name: one for name, one in texts.items() if name in own}
        layers |= own
    adapter = lora_settings(factors, layers)
    return InitialLoRA(
        adapter=replace(adapter, initial=str(path), initial_hash=_hash(factors)),
        factors=factors,
        remarks=remarks,
    )


def _left_out(layers: Sequence[str], path: Path, *, partial: bool) -> str:
    """Return a line on layers of text encoders that are not trained.

    Raises:
        CheckpointError: unless they may be left out.
    """
    line = f"{len(layers)} layers of text encoders cannot be trained: {', '.join(layers[:4])}"
    if not partial:
        raise CheckpointError(line, where=str(path), hint="leave them out with --partial")
    return f"left out: {line}"


def _hash(factors: Mapping[str, Factors]) -> str:
    """Return the SHA-256 of values, scales and layers' names, however a file spells them."""
    tensors: dict[str, Tensor] = {}
    for layer, change in factors.items():
        tensors |= {f"{layer}.down": change.down, f"{layer}.up": change.up}
        tensors[f"{layer}.scale"] = torch.tensor(change.scale, dtype=torch.float64)
    return digest(tensors)


def lora_settings(factors: Mapping[str, Factors], layers: Mapping[str, nn.Module]) -> LoRA:
    """Return the settings of a LoRA with factors of these layers, ranks and scales.

    Args:
        factors: of some of the model's layers, by name.
        layers: all that could be adapted; of text encoders only where some are.
    """
    linear = {name for name, layer in layers.items() if not isinstance(layer, nn.Conv2d)}
    convolutions = not factors.keys() <= linear
    ranks = {layer: change.rank for layer, change in factors.items()}
    alphas = {layer: _alpha(change) for layer, change in factors.items()}
    rank, rank_pattern = _usual(ranks)
    alpha: float | None = None
    alpha_pattern: dict[str, float] = {}
    if any(alphas[layer] != ranks[layer] for layer in factors):
        alpha, alpha_pattern = _usual(alphas)
    return LoRA(
        rank=rank,
        alpha=alpha,
        layers=patterns(factors.keys(), layers.keys() if convolutions else linear),
        convolutions=convolutions,
        text_encoders=any(name.startswith(TEXT_PART) for name in layers),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
    )


def _alpha(factors: Factors) -> float:
    """Return scale times rank, without the rounding of that product where that is possible."""
    product = factors.scale * factors.rank
    exact = (value for value in (float(round(product)), round(product, 6), product))
    return next((value for value in exact if value / factors.rank == factors.scale), product)


def _usual(values: Mapping[str, V]) -> tuple[V, dict[str, V]]:
    """Return the most frequent value, and the others by patterns of their layers' names."""
    counts = Counter(values.values())
    usual = counts.most_common(1)[0][0]
    others = {
        pattern: value
        for value in counts
        if value != usual
        for pattern in patterns({name for name in values if values[name] == value}, values.keys())
    }
    return usual, others


def patterns(chosen: Collection[str], among: Collection[str]) -> tuple[str, ...]:
    """Return few regular expressions that are found in these names and in no others of `among`."""
    wanted = set(chosen)
    if wanted == set(among):
        return (ALL,)
    for depth in DEPTHS:
        ends = sorted({_end(name, depth) for name in wanted})
        found = tuple(rf"(^|\.){re.escape(end)}$" for end in ends)
        if {name for name in among if any(re.search(one, name) for one in found)} == wanted:
            return found
    return tuple(f"^{re.escape(name)}$" for name in sorted(wanted))


def _end(name: str, depth: int) -> str:
    """Return the last parts of a path; numbers are not counted as parts."""
    parts = name.split(".")
    words = [number for number, part in enumerate(parts) if not part.isdecimal()]
    return ".".join(parts[words[-min(depth, len(words))] :])
