"""LoRA files of other programs, read: diffusers, kohya's sd-scripts, peft, and what resembles them.

A change of a layer is two tensors, and a scale that may be written beside them, in the header or in
a configuration, or nowhere. Every tensor of a file is used or named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from sfumato.adapters import Factors
from sfumato.errors import CheckpointError
from sfumato.interop.lora_kinds import kind_of, match_tensor, require_lora
from sfumato.interop.lora_names import LayerNames
from sfumato.interop.lora_scales import PeftSettings, header_settings, read_peft_config
from sfumato.interop.original_names import Piece
from sfumato.interop.safetensors_files import read_safetensors

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
DOWN, UP, ALPHA = "down", "up", "alpha"
SIDES = {"A": DOWN, "down": DOWN, "B": UP, "up": UP}
Changes = dict[str, dict[str, Factors]]  # by part ("unet", "text_encoder", ...) and layer


@dataclass(frozen=True, kw_only=True)
class ReadLoRA:
    """A LoRA file, as far as it fits a model.

    Attributes:
        changes: of the model's layers, by part and path.
        remarks: what was counted, left out or found in the header.
        header: texts of the file's header.
    """

    changes: Changes
    remarks: tuple[str, ...]
    header: Mapping[str, str] = field(repr=False)


@dataclass
class _Layer:
    """The tensors of one layer of a file, by `DOWN`, `UP` and `ALPHA`, and their names."""

    name: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Source:
    """A safetensors file, with the configuration beside it, if any.

    Attributes:
        part: whose layers have no prefix in it; "" if that is not said.
    """

    path: Path
    settings: PeftSettings | None
    part: str = ""


def read_lora(path: Path, names: LayerNames, *, partial: bool = False) -> ReadLoRA:
    """Read a LoRA file, or a folder with one.

    Args:
        names: of the layers of the model that it is for.
        partial: whether tensors that fit no layer of the model are left out; otherwise the file is
            refused.
    Raises:
        CheckpointError: if it cannot be read, holds something else or a kind that is not supported,
            contradicts itself, or does not fit the model.
    """
    parts = [_read_file(source, names, partial) for source in _sources(path)]
    fitting: Changes = {}
    for read in parts:
        for part, layers in read.changes.items():
            twice = layers.keys() & fitting.get(part, {}).keys()
            if twice:
                raise _contradiction(path, f"changes {sorted(twice)[0]} in two files")
            fitting[part] = {**fitting.get(part, {}), **layers}
    remarks = tuple(remark for read in parts for remark in read.remarks)
    return ReadLoRA(changes=fitting, remarks=remarks, header=parts[0].header)


def _sources(path: Path) -> list[_Source]:
    """Return the safetensors files of a LoRA."""
    if path.is_dir():
        for name in (PEFT_FILE, DIFFUSERS_FILE):
            if (path / name).is_file():
                return _sources(path / name)
        folders = sorted(folder for folder in path.iterdir() if (folder / PEFT_FILE).is_file())
        if folders:
            return [
                replace(source, part=folder.name)
                for folder in folders
                for source in _sources(folder / PEFT_FILE)
            ]
        single = sorted(path.glob("*.safetensors"))
        if len(single) == 1:
            return _sources(single[0])
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
        raise CheckpointError(
            f"has no {PEFT_FILE} and no {DIFFUSERS_FILE}"
            + (f" (there is {pickles[0]}, a pickle)" if pickles else ""),
            where=str(path),
            hint="pickles can run programs and are not read: get it as .safetensors"
            if pickles
            else "name the file itself",
        )
    if path.suffix in PICKLES:
        raise CheckpointError(
            "is a pickle, by its name",
            where=str(path),
            hint="pickles can run programs and are not read: get it as .safetensors",
        )
    config = path.with_name(PEFT_CONFIG)
    own = path.name == PEFT_FILE and config.is_file()
    return [_Source(path, read_peft_config(config) if own else None)]


def _read_file(source: _Source, names: LayerNames, partial: bool) -> ReadLoRA:
    path = source.path
    tensors, header = read_safetensors(path)
    require_lora(path, tensors)
    layers, others = _sorted_by_layer(path, tensors)
    settings = header_settings(header, where=str(path))
    changes: Changes = {}
    unfit = dict(others)
    origins: dict[tuple[str, str], str] = {}
    for layer in layers:
        pieces, plain = names.find(layer.name, source.part)
        part = pieces[0].part if pieces else ""
        scale = _scale(path, layer, plain, source.settings or settings.get(part))
        whole = _factors(path, layer, scale)
        reason = _misfit(whole, pieces, names)
        if reason:
            unfit |= dict.fromkeys(layer.keys, reason)
            continue
        for piece in pieces:
            before = origins.setdefault((piece.part, piece.layer), layer.name)
            if before != layer.name:
                raise _contradiction(path, f"{before} and {layer.name} are the same layer")
            changes.setdefault(piece.part, {})[piece.layer] = _cut(whole, piece, names)
    fitting = sum(not unfit.keys() & set(layer.keys) for layer in layers)
    count = (
        f"{fitting} of {len(layers)} layers ({len(tensors) - len(unfit)} of {len(tensors)} tensors)"
    )
    if unfit and not (partial and fitting):
        raise _misfits(path, count, unfit, fitting)
    left_out = f"; {len(unfit)} tensors are left out, {_named(unfit)}" if unfit else ""
    remarks = (f"{path.name}: {count} fit the model{left_out}", *_header_remarks(path, header))
    return ReadLoRA(changes=changes, remarks=remarks, header=header)


def _sorted_by_layer(
    path: Path, tensors: Mapping[str, Tensor]
) -> tuple[list[_Layer], dict[str, str]]:
    """Return the layers, and what the tensors are, by name, that belong to none."""
    layers: dict[str, _Layer] = {}
    others = {}
    for key, tensor in tensors.items():
        match = match_tensor(key)
        if match is None:
            others[key] = kind_of(key) or "unknown"
            continue
        layer = layers.setdefault(match["layer"], _Layer(match["layer"]))
        side = ALPHA if match["alpha"] else SIDES[match["side"]]
        if side in layer.tensors:
            raise _contradiction(path, f"{layer.name} has its {side} tensor twice")
        layer.tensors[side] = tensor
        layer.keys.append(key)
    for layer in list(layers.values()):
        if layer.tensors.keys() == {ALPHA}:
            others[layer.keys[0]] = "alpha of a layer without factors"
            del layers[layer.name]
        elif missing := {DOWN, UP} - layer.tensors.keys():
            raise _contradiction(
                path, f"{layer.keys[0]} is there, and the {sorted(missing)[0]} tensor is missing"
            )
    return list(layers.values()), others


def _factors(path: Path, layer: _Layer, scale: float) -> Factors:
    """Return the factors as they are written, in float32, and their scale."""
    down, up = layer.tensors[DOWN], layer.tensors[UP]
    if not (down.is_floating_point() and up.is_floating_point()):
        raise _contradiction(path, f"{layer.keys[0]} has values of type {down.dtype}")
    if down.ndim not in (2, 4) or up.ndim not in (2, 4) or down.shape[0] != up.shape[1]:
        shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        raise _contradiction(path, f"{layer.name} has factors {shapes}, which cannot be multiplied")
    return Factors(down.float(), up.float(), scale)


def _scale(path: Path, layer: _Layer, name: str, settings: PeftSettings | None) -> float:
    """Return what a layer's product is multiplied by.

    An alpha tensor says alpha / rank. A configuration of peft says it too, for each layer. Where
    there is neither, it is 1. The rank is always the layer's own.
    """
    rank = layer.tensors[DOWN].shape[0] if layer.tensors[DOWN].ndim else 0
    if rank == 0:
        raise _contradiction(path, f"{layer.name} has rank 0")
    configured = None if settings is None else settings.scale(name, rank, where=str(path))
    if ALPHA not in layer.tensors:
        return 1.0 if configured is None else configured
    alpha = layer.tensors[ALPHA]
    if alpha.numel() != 1:
        raise _contradiction(path, f"{layer.name}.alpha has {alpha.numel()} values")
    scale = float(alpha.float().reshape(())) / rank
    if configured is not None and abs(configured - scale) > 1e-3 * abs(scale):
        raise _contradiction(
            path,
            f"{layer.name}: its alpha tensor gives a scale of {scale:g}, its configuration "
            f"{configured:g}",
        )
    return scale


def _misfit(factors: Factors, pieces: tuple[Piece, ...], names: LayerNames) -> str:
    """Return why factors do not fit the layers that their name stands for; "" if they fit."""
    if not pieces:
        return "no layer of this name"
    for piece in pieces:
        shape = names.shapes(piece.part)[piece.layer]
        rows = max((stop for _, stop in piece.rows), default=shape[0])
        if rows > len(factors.up) or not _cut(factors, piece, names).fits(shape):
            own = (len(factors.up), *factors.down.shape[1:])
            return f"shape {own} where {piece.layer} has {tuple(shape)}"
    total = sum(names.shapes(piece.part)[piece.layer][0] for piece in pieces)
    return "" if len(factors.up) == total else f"{len(factors.up)} outputs where {total} are fused"


def _cut(factors: Factors, piece: Piece, names: LayerNames) -> Factors:
    """Return the rows of a fused layer's change that are one layer's."""
    if piece.rows:
        up = torch.cat([factors.up[start:stop] for start, stop in piece.rows])
        factors = replace(factors, up=up)
    shape = names.shapes(piece.part)[piece.layer]
    return factors.shaped(shape) if factors.fits(shape) else factors


def _misfits(path: Path, count: str, unfit: Mapping[str, str], fitting: int) -> CheckpointError:
    return CheckpointError(
        f"{count} fit the model, and {len(unfit)} tensors do not: {_named(unfit)}",
        where=str(path),
        hint="it was made for another model"
        if not fitting
        else "it was made for another model, or changes parts that are not supported; --partial "
        "(partial=True) uses what fits",
    )


def _named(unfit: Mapping[str, str]) -> str:
    """Name tensors, with the reason, a few of each kind."""
    reasons = Counter(unfit.values())
    said = []
    for reason, number in reasons.most_common(3):
        first = next(key for key, value in unfit.items() if value == reason)
        said.append(f"{first} ({reason}" + (f"; {number} such)" if number > 1 else ")"))
    return ", ".join(said) + (", ..." if len(reasons) > 3 else "")


def _header_remarks(path: Path, header: Mapping[str, str]) -> Iterator[str]:
    triggers = header.get("modelspec.trigger_phrase", "")
    if triggers:
        yield f"{path.name}: its trigger phrase is {triggers!r}"
    skip = header.get("ss_clip_skip", "")
    # sd-scripts ignores it for SDXL
    if skip.isdecimal() and int(skip) > 1 and "sdxl" not in header.get("ss_base_model_version", ""):
        here = int(skip) - 1
        yield (
            f"{path.name}: trained with clip skip {skip} as sd-scripts counts, which is applied by "
            f"--clip-skip {here} (when fine-tuning, conditioner.text.clip_skip={here})"
        )


def _contradiction(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        what, where=str(path), hint="the file is damaged, or was written by a faulty program"
    )
