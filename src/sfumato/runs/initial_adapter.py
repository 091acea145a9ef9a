"""The first values of a trained adapter: those of a LoRA file, or of another run's LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato import config as configuration
from sfumato.adapters import Adapter, LoRA, adapted_layers
from sfumato.conditioners import CompositeConditioner, ConditioningInfo
from sfumato.errors import CheckpointError, ConfigError
from sfumato.generation.diffusion_model import Model
from sfumato.interop.initial_lora import TEXT_PART, initial_lora
from sfumato.networks import Backbone
from sfumato.recipes.model import text_encoder
from sfumato.recipes.resolver import resolve
from sfumato.recipes.run import Run
from sfumato.runs.weights import chosen_weights
from sfumato.storage import checkpoint
from sfumato.storage.run_directory import RunDirectory

NETWORK, ENCODERS = "network", "conditioner.parts.text.encoders"  # in the names of tensors
PLACE = ("initial", "initial_hash")  # settings that say where the values are from


@dataclass(frozen=True, kw_only=True)
class InitialAdapter:
    """What an adapter begins with.

    Attributes:
        adapter: settings that the values have, with their place and their hash.
        tensors: by their names in the model.
        remarks: what was counted or left out in a file.
        info: of the run, for a run.
    """

    adapter: LoRA
    tensors: Mapping[str, Tensor]
    remarks: tuple[str, ...] = ()
    info: ConditioningInfo | None = None


def read_initial(
    path: Path,
    network: Backbone,
    conditioner: CompositeConditioner | None,
    *,
    partial: bool = False,
) -> InitialAdapter:
    """Read a LoRA file, or the LoRA of a run.

    Args:
        network: that it is for, which may be on the meta device.
        conditioner: that it is for; None if text encoders are not to be trained.
        partial: whether tensors of a file that fit no layer of the model are left out.
    Raises:
        CheckpointError: if it is not there, cannot be read or does not fit.
        ConfigError: for a run without a LoRA.
    """
    if not path.exists():
        raise CheckpointError(
            "is not there, and the first values of this run's LoRA are read from it",
            where=str(path),
            hint="put it back, or set adapter.initial to its new place",
        )
    if (path / "config.yaml").is_file():
        return initial_of_run(path)
    read = initial_lora(path, network, conditioner, partial=partial)
    tensors: dict[str, Tensor] = {}
    for layer, factors in read.factors.items():
        place = ENCODERS if layer.startswith(TEXT_PART) else NETWORK
        tensors[f"{place}.{layer}.lora_A"] = factors.down
        tensors[f"{place}.{layer}.lora_B"] = factors.up
    return InitialAdapter(adapter=read.adapter, tensors=tensors, remarks=read.remarks)


def initial_of_run(path: Path) -> InitialAdapter:
    """Read the LoRA of a run: the weights that it is sampled with by default.

    Raises:
        ConfigError: if it has another kind of adapter, or is a bundle, which has no base.
        RunError, CheckpointError: if it has no usable checkpoint.
    """
    directory = RunDirectory.existing(path)
    run = resolve(directory.path)
    if not isinstance(run.adapter, LoRA):
        kind = configuration.kind_of(type(run.adapter))
        raise ConfigError(
            f"is itself fine-tuned by adapter.kind={kind}, whose changes are kept apart from its "
            "base and cannot be continued",
            where=str(path),
            hint="fine-tune its base on the images of both",
        )
    if not run.has_base:
        raise ConfigError(
            "is a bundle: the base of its LoRA is inside, and cannot be fine-tuned by itself",
            where=str(path),
            hint="name the run that the bundle was written from",
        )
    loaded, _ = checkpoint.read_newest(directory.checkpoints)
    tensors = {
        name: tensor
        for name, tensor in chosen_weights("auto", loaded, directory).items()
        if not name.startswith("auxiliary.")
    }
    return InitialAdapter(
        adapter=replace(run.adapter, initial=str(path), initial_hash=checkpoint.digest(tensors)),
        tensors=tensors,
        info=configuration.parse(
            ConditioningInfo, loaded.state.get("facts"), where=str(loaded.path)
        ),
    )


def outline(run: Run, info: ConditioningInfo) -> tuple[Backbone, CompositeConditioner]:
    """Return the network of a run on the meta device, its layers without weights, and the conditioner."""
    conditioner = run.conditioner.build(info, encoder=text_encoder)
    channels = run.autoencoder.latent_shape(run.data.channels, None).channels
    with torch.device("meta"):
        network = run.network.from_scratch()
        return network.build(image_channels=channels, context=conditioner.sizes), conditioner


def require_same_settings(adapter: Adapter, initial: LoRA) -> None:
    """Raise ConfigError, naming the key, if settings contradict the values that a LoRA begins with.

    Args:
        adapter: as it is configured.
        initial: settings that the values have.
    """
    name = Path(initial.initial).name
    if not isinstance(adapter, LoRA):
        raise ConfigError(
            f"adapter.kind={configuration.kind_of(type(adapter))} cannot begin with a LoRA, which "
            f"{name} has",
            where="adapter.kind",
            hint="leave it out; or name a base without a LoRA",
        )
    wanted, given = _comparable(initial), _comparable(adapter)
    for key, value in wanted.items():
        if given[key] != value:
            raise ConfigError(
                f"{_shown(given[key])} contradicts {name}, which has {_shown(value)}",
                where=f"adapter.{key}",
                hint="leave it out: rank, alpha and layers are those of the LoRA that is continued",
            )


def _comparable(adapter: LoRA) -> dict[str, Any]:
    """Return what decides on the factors' shapes and scales."""
    values = {entry.name: getattr(adapter, entry.name) for entry in fields(adapter)}
    own = {key: value for key, value in values.items() if key not in PLACE}
    return own | {"alpha": float(adapter.rank if adapter.alpha is None else adapter.alpha)}


def _shown(value: Any) -> str:
    text = str(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def begin_adapter(run: Run, model: Model) -> None:
    """Load the first values of a run's adapter into its untrained model, if it has any.

    Raises:
        CheckpointError: if they are gone, were changed since the run was configured, or do not fit
            the model.
        ConfigError: if the run's settings contradict them.
    """
    if not run.adapter.begins_with:
        return
    assert isinstance(run.adapter, LoRA)
    before = run.adapter.initial_hash
    # a hash is that of what fits, so that nothing else is left out than was agreed to
    place = Path(run.adapter.initial)
    conditioner = model.conditioner if run.adapter.text_encoders else None
    read = read_initial(place, model.network, conditioner, partial=bool(before))
    require_same_settings(run.adapter, read.adapter)
    now = read.adapter.initial_hash
    if before and before != now:
        raise CheckpointError(
            f"has changed: the hash of its LoRA is {now[:12]}, and was {before[:12]}",
            where=run.adapter.initial,
            hint="begin the fine-tuning again",
        )
    _load(model, read.tensors, where=run.adapter.initial)


def _load(model: Model, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Load the factors of all adapted layers, and what else was learned."""
    own = dict(model.named_parameters())
    factors = {
        f"{name}.{factor}" for name in adapted_layers(model) for factor in ("lora_A", "lora_B")
    }
    unfit = sorted(
        (factors ^ {name for name in tensors if name.rpartition(".")[2] in ("lora_A", "lora_B")})
        | {name for name in tensors if name not in own}
        | {name for name in factors & tensors.keys() if own[name].shape != tensors[name].shape}
    )
    if unfit:
        raise CheckpointError(
            f"{len(unfit)} tensors are missing, unknown or of another shape, e.g. {unfit[0]}",
            where=where,
            hint="leave adapter, network and conditioner as they are in what is continued",
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            # categories that are new come after those that were learned
            own[name][: len(tensor)] = tensor.to(own[name])
