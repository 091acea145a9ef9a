"""Weights of diffusers' folders: their files, and loading without a random initialization or a second
copy in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from sfumato.errors import CheckpointError
from sfumato.nn.frozen_layers import PackedWeight, pack, packed_layers, without_scales
from sfumato.storage.weight_files import unreadable

WEIGHTS = "diffusion_pytorch_model"
MAPPED_BYTES = 32 << 20  # of a file, after which it is mapped again


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Build modules whose parameters have a shape only; `load_weights` gives them their values.

    Buffers are built as usual, since not all of them are in files.
    """

    def shape_only(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(shape_only)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def load_weights(model: nn.Module, folder: Path, *, variant: str = "") -> None:
    """Load the weights of a folder in diffusers' layout into a model.

    They become float32, or what their layers store them in (`sfumato.nn.frozen_layers`). The
    model's own tensors are replaced, so that they need no values and no memory before.

    Raises:
        CheckpointError: naming the file or the tensor that is missing, damaged or does not fit.
    """
    files = weight_files(folder, variant=variant)
    places = {name: file for file in files for name in _names(file)}
    packed = packed_layers(model)
    expected = without_scales(model.state_dict(), packed)
    missing, unknown = expected.keys() - places.keys(), places.keys() - expected.keys()
    if missing or unknown:
        raise CheckpointError(
            f"{len(missing)} tensors are missing and {len(unknown)} are unknown, e.g. "
            f"{sorted(missing or unknown)[0]}",
            where=str(folder),
            hint="the weights belong to another config.json",
        )
    loaded: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in _views(file):
            _require_fitting(name, tensor, expected[name], folder)
            loaded |= _stored(name, tensor, packed)
    model.load_state_dict(loaded, assign=True)


def _views(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file by name, each a view of the file that is to be dropped.

    Pages of a mapped file stay in memory while it is open; so it is mapped again from time to time.
    """
    names = _names(file)
    while names:
        with _opened(file) as content:
            size = 0
            while names and size < MAPPED_BYTES:
                name = names.pop()
                tensor: Tensor = content.get_tensor(name)
                size += tensor.nbytes
                yield name, tensor
                del tensor


def _stored(name: str, tensor: Tensor, packed: Mapping[str, PackedWeight]) -> dict[str, Tensor]:
    """Return a tensor as a model stores it, by name: a copy, since that of the file is a view."""
    layer, _, kind = name.rpartition(".")
    if kind != "weight" or layer not in packed:
        return {name: tensor.to(torch.float32, copy=True)}
    weight, scale = pack(tensor, packed[layer].weight.dtype)
    return {name: weight} if scale is None else {name: weight, f"{layer}.weight_scale": scale}


def read_weights(folder: Path, *, variant: str = "") -> dict[str, Tensor]:
    """Read the tensors of a folder in diffusers' layout, in the precision that they are stored in.

    Raises:
        CheckpointError: naming the file that is missing or damaged.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder, variant=variant):
        with _opened(file) as content:
            names: list[str] = content.keys()
            tensors |= {name: content.get_tensor(name) for name in names}
    return tensors


def _require_fitting(name: str, tensor: Tensor, expected: Tensor, folder: Path) -> None:
    if tensor.shape != expected.shape:
        raise CheckpointError(
            f"{name} has shape {tuple(tensor.shape)}, and the network needs "
            f"{tuple(expected.shape)}",
            where=str(folder),
            hint="the weights belong to another config.json",
        )
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(
            f"{name} has values that are not finite",
            where=str(folder),
            hint="download it again, or use another variant",
        )


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as content:
            yield content
    except (SafetensorError, OSError) as error:
        raise unreadable(file, error) from None


def _names(file: Path) -> list[str]:
    with _opened(file) as content:
        return list(content.keys())


def weight_files(folder: Path, *, variant: str = "", stem: str = WEIGHTS) -> list[Path]:
    """Return the safetensors files of a folder, one or several shards.

    Without `variant`, a variant is taken where it is the only one.

    Args:
        stem: how the names of the files begin; models of transformers have "model".
    Raises:
        CheckpointError: if there are none, a shard is missing, or there are several variants.
    """
    variant = variant or only_variant(folder, stem=stem)
    named = f".{variant}" if variant else ""
    plain = folder / f"{stem}{named}.safetensors"
    sharded = sorted(folder.glob(f"{stem}{named}-*-of-*.safetensors"))
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
    others = sorted(path.name for path in folder.glob(f"{stem}*"))
    raise CheckpointError(
        f"has no {plain.name}" + (f" (there are {', '.join(others)})" if others else ""),
        where=str(folder),
        hint="name one with --variant"
        if any(name.endswith(".safetensors") for name in others)
        else "only .safetensors are read; download the model with its safetensors files",
    )


def only_variant(folder: Path, *, stem: str = WEIGHTS) -> str:
    """Return the variant of a folder's weights where there is only one kind of them, "" otherwise."""
    variants = {
        path.name.removeprefix(stem).removesuffix(".safetensors").partition("-")[0].lstrip(".")
        for path in folder.glob(f"{stem}*.safetensors")
    }
    return variants.pop() if len(variants) == 1 else ""
