"""LoRA files of other programs, used by a model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from sfumato.adapters import (
    Controlled,
    adaptable_layers,
    add_product,
    bare,
    sharing_tensors,
)
from sfumato.errors import ConfigError
from sfumato.generation.pipeline import Pipeline
from sfumato.interop.lora_files import read_lora
from sfumato.interop.lora_names import LayerNames
from sfumato.interop.peft_import import as_products_in_place, read_kind
from sfumato.observability.progress import console


def with_lora(
    pipeline: Pipeline, path: str | Path, strength: float = 1.0, *, partial: bool = False
) -> Pipeline:
    """Return a pipeline whose layers are changed by a LoRA file of diffusers, kohya or peft, or by
    a folder of peft with OFT, LoKr or DoRA.

    The pipeline that is given stays as it is, and shares its weights with the new one. Several add
    up: `with_lora(with_lora(pipeline, a), b, 0.5)`.

    Args:
        path: a .safetensors file, or a folder that diffusers or peft wrote.
        strength: factor on the change; 0 changes nothing, negative ones are subtracted.
        partial: whether tensors that fit no layer of the model are left out; otherwise the file is
            refused.
    Raises:
        CheckpointError: if it cannot be read, is of a kind that is not supported, or does not fit.
        ConfigError: for a model of adapter.kind=control-lora.
    """
    if not math.isfinite(strength):
        raise ConfigError(f"strength = {strength}", where=str(path), hint="use a finite number")
    network, conditioner = pipeline.model.network, pipeline.model.conditioner
    if isinstance(network, Controlled):
        raise ConfigError(
            "cannot be added to this model, whose own LoRA acts on images with a doodle alone",
            where=str(path),
            hint="add it to the base of the model, or control it by adapter.kind=controlnet",
        )
    plain = bare(network.implementation)
    names = LayerNames(plain, conditioner.text_encoders)
    read = read_kind(Path(path), plain, names) or read_lora(Path(path), names, partial=partial)
    for remark in read.remarks:
        console().print(f"note: {remark}", markup=False)
    model = sharing_tensors(pipeline.model)
    as_products_in_place(model.network.implementation)
    changed = {names.network: model.network.implementation}
    if texts := read.changes.keys() - changed:
        # the encoders are not part of the model, and are copied here
        encoders = model.conditioner.text_encoders()
        copies = {name: sharing_tensors(encoders[name]) for name in texts}
        model.conditioner.replace_text_encoders(copies)
        changed |= copies
    for part, layers in read.changes.items():
        own = adaptable_layers(changed[part])
        for name, factors in layers.items():
            add_product(own[name], factors.times(strength))
    return replace(pipeline, model=model)
