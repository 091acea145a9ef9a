"""What control by a wider input layer adds to a base, in one file without the base.

No other program reads it: the control pipeline of FLUX.1 in diffusers has a wider input layer too,
and fills it with latents of the control image, where ours holds the folded drawing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato import config as configuration
from sfumato.adapters import Addition, ControlLoRA, added_parameters, sharing_tensors
from sfumato.conditioners import CompositeConditioner
from sfumato.contexts import ContextConfig
from sfumato.errors import CheckpointError, ConfigError
from sfumato.generation.diffusion_model import Model
from sfumato.generation.pipeline import Pipeline
from sfumato.interop.merging import NAMES, require_dtype, round_tensor
from sfumato.interop.safetensors_files import read_safetensors
from sfumato.interop.trained_model import TrainedModel
from sfumato.observability.progress import console
from sfumato.recipes.model import text_encoder
from sfumato.storage.checkpoint import digest
from sfumato.training.parameters import count, without

ADAPTER, CONTEXTS, BASE = "sfumato.adapter", "sfumato.contexts", "sfumato.base_sha256"  # header


def write_control(trained: TrainedModel, path: Path, dtype: torch.dtype) -> list[str]:
    """Write what was trained to a new file.

    It is read back, and its tensors are compared with those of the run.

    Raises:
        ConfigError: if the conditioner was trained too, or a tensor overflows in `dtype`.
        CheckpointError: if the file differs from the run by more than the precision explains.
    """
    require_dtype(dtype)
    network, conditioner = trained.pipeline.model.network, trained.pipeline.model.conditioner
    if any(isinstance(part, Addition) for part in conditioner.modules()):
        raise ConfigError(
            "has new categories, which are in the conditioner and not in the network",
            where=str(trained.directory),
            hint="use --format bundle",
        )
    added = {name: tensor.detach().cpu() for name, tensor in added_parameters(network).items()}
    settings = configuration.plain(trained.run)
    drawn = [name for name in trained.run.conditioner.names if name in conditioner.over_image]
    header = {
        "format": "pt",
        ADAPTER: json.dumps(settings["adapter"]),
        CONTEXTS: json.dumps({name: settings["conditioner"][name] for name in drawn}),
        BASE: digest(without(network.state_dict(), added)),
    }
    tensors = {name: round_tensor(name, tensor, dtype) for name, tensor in added.items()}
    save_file(tensors, path, metadata=header)
    read, _ = read_safetensors(path)
    difference = max(float((read[name] - tensor).abs().max()) for name, tensor in added.items())
    if dtype is torch.float32 and difference:
        raise CheckpointError(
            f"what was written differs from what the run has by up to {difference:g}",
            where=str(path),
            hint="report this with the run's config.yaml",
        )
    return [
        f"control by {' and '.join(drawn)}: {count(added.values())} parameters, {NAMES[dtype]}; "
        "sfumato alone reads it",
        f"read back: {len(read)} of {len(added)} tensors, largest difference {difference:g}",
    ]


def with_control(pipeline: Pipeline, path: str | Path) -> Pipeline:
    """Return a pipeline that is steered by what a file of `write_control` reads, such as doodles.

    The pipeline that is given stays as it is, and shares its weights with the new one.

    Raises:
        CheckpointError: if the file is of another kind, or does not fit the model.
        ConfigError: if the model reads maps over the image already.
    """
    tensors, header = read_safetensors(Path(path))
    adapter, contexts = _settings(header, str(path))
    if pipeline.model.conditioner.sizes.spatial:
        raise ConfigError(
            "the model is steered by something over the image already",
            where=str(path),
            hint="use the base that the file was trained on",
        )
    model = sharing_tensors(pipeline.model)
    network, before = model.network, model.conditioner
    if header.get(BASE) != digest(network.state_dict()):
        console().print(f"note: {path} was trained on another base", markup=False)
    new = contexts.build(pipeline.info, encoder=text_encoder).parts
    parts: dict[str, Any] = {**before.parts, **{name: new[name] for name in contexts.names}}
    conditioner = CompositeConditioner(parts, factor=before.factor)
    adapter.apply(network, conditioner)
    _load(network, tensors, str(path))
    changed = Model(network, conditioner, model.config).eval().requires_grad_(False)
    device = next(network.parameters()).device
    return replace(pipeline, model=changed.to(device))


def _settings(header: Mapping[str, str], where: str) -> tuple[ControlLoRA, ContextConfig]:
    """Return the adapter and the contexts that a file's header names."""
    try:
        adapter, contexts = json.loads(header[ADAPTER]), json.loads(header[CONTEXTS])
        kind = adapter.pop("kind")
    except (KeyError, ValueError, AttributeError):
        kind = ""
    if kind != ControlLoRA.kind:
        raise CheckpointError(
            "is not a control file of sfumato",
            where=where,
            hint="write one with sfumato export RUN --format control-lora",
        )
    return (
        configuration.parse(ControlLoRA, adapter, where=where),
        configuration.parse(ContextConfig, contexts, where=where),
    )


def _load(network: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load what control adds.

    Raises:
        CheckpointError: naming the first tensor that does not fit.
    """
    added = added_parameters(network)
    names = sorted(
        name
        for name in added.keys() | tensors.keys()
        if name not in added or name not in tensors or added[name].shape != tensors[name].shape
    )
    if names:
        raise CheckpointError(
            f"{len(names)} of {len(added)} tensors do not fit the model, e.g. {names[0]}",
            where=where,
            hint="use the base that the file was trained on",
        )
    with torch.no_grad():
        for name, parameter in added.items():
            parameter.copy_(tensors[name])
