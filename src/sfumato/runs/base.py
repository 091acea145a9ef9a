"""The base of a fine-tuning: a run whose weights another one starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from sfumato import config as configuration
from sfumato.adapters import Addition
from sfumato.condition import reorder
from sfumato.conditioners import ConditioningInfo
from sfumato.contexts import user_contexts
from sfumato.data import Dataset
from sfumato.errors import CheckpointError, ConfigError
from sfumato.generation.diffusion_model import Model
from sfumato.recipes.resolver import resolve
from sfumato.recipes.run import Run
from sfumato.recipes.run_origin import require_leave
from sfumato.storage import checkpoint
from sfumato.storage.run_directory import RunDirectory
from sfumato.training.preservation import KnownContexts


@dataclass(frozen=True, kw_only=True)
class Base:
    """What is taken over from the newest checkpoint of a run.

    Attributes:
        run: its configuration.
        info: what its conditioner was built from.
        tensors: its averaged weights, without modules that only training uses.
    """

    run: Run
    info: ConditioningInfo
    tensors: Mapping[str, Tensor]


def require_base(run: Run) -> None:
    """Raise CheckpointError, naming the key, if the weights that a run starts from are gone."""
    places = {"base": run.base, "network.path": run.network.origin}
    for key, place in places.items():
        if place and not Path(place).exists():
            raise CheckpointError(
                f"{place}: the base of this run is not there any more",
                where=key,
                hint=f"if it has moved, set `{key}` in the run's config.yaml to its new place; "
                f"`sfumato resume RUN {key}=NEW` does so too",
            )


def read_base(path: str | Path) -> Base:
    """Read a run that is to be fine-tuned.

    Raises:
        RunError, CheckpointError: if it is no run, or has no usable checkpoint.
        ConfigError: if it is itself a fine-tuning whose changes are kept apart from its base.
    """
    directory = RunDirectory.existing(Path(path))
    run = resolve(directory.path)
    require_leave(directory.path, run, data=False)
    if run.adapter.needs_base:
        raise ConfigError(
            f"is itself fine-tuned by adapter.kind={configuration.kind_of(type(run.adapter))}, and "
            "its changes are kept apart from its base",
            where=str(path),
            hint="fine-tune its base on the images of both, or fine-tune it with "
            "adapter.kind=none first",
        )
    loaded, _ = checkpoint.read_newest(directory.checkpoints)
    info = configuration.parse(ConditioningInfo, loaded.state.get("facts"), where=str(loaded.path))
    if info.added_categories:
        raise ConfigError(
            f"was fine-tuned with {info.added_categories} new categories, which cannot be "
            "continued yet",
            where=str(path),
            hint="fine-tune its base on the images of both",
        )
    frozen = checkpoint.load_frozen(loaded.path, loaded.state)
    tensors = {
        name: tensor
        for name, tensor in {**frozen, **loaded.tensors["ema"]}.items()
        if not name.startswith("auxiliary.")
    }
    return Base(run=run, info=info, tensors=tensors)


def base_loader(run: Run, base: Base | None = None) -> Callable[[Model], None]:
    """Return what loads the base of a run into a model; it does nothing for a run without one.

    Args:
        base: of the run, if it was read already.
    """
    if not run.base:
        return lambda model: None
    return partial(load_base, base=base or read_base(run.base))


def load_base(model: nn.Module, base: Base) -> None:
    """Load the weights of a base into a model that may have additions.

    Raises:
        CheckpointError: if they do not fit.
    """
    try:
        result = model.load_state_dict(dict(base.tensors), strict=False)
    except RuntimeError as error:
        raise CheckpointError(
            f"does not fit: {' '.join(str(error).split())[:300]}",
            where=base.run.name,
            hint="leave network and conditioner as they are in the base",
        ) from None
    added = {
        f"{prefix}.{name}"
        for prefix, part in model.named_modules()
        if isinstance(part, Addition)
        for name, _ in part.named_parameters()
    }
    missing = set(result.missing_keys) - added
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"{len(missing)} tensors are missing and {len(result.unexpected_keys)} are unknown, "
            f"e.g. {sorted(missing or result.unexpected_keys)[0]}",
            where=base.run.name,
            hint="leave network and conditioner as they are in the base",
        )


def inherited_info(info: ConditioningInfo, base: ConditioningInfo) -> ConditioningInfo:
    """Return what the conditioner of a fine-tuned model must know.

    Categories that only the new images have come after those of the base; words, attributes and
    ranges are those that the base was trained with.

    Args:
        info: of the new images.
    Raises:
        ConfigError: if the base's categories do not come first.
    """
    count = len(base.categories)
    if info.categories[:count] != base.categories:
        raise ConfigError(
            f"the first {count} categories are not those of the base",
            where="data.categories",
            hint=f"set data.categories=[{', '.join(base.categories)}]",
        )
    added = info.categories[count:] if base.categories else ()
    return replace(
        base,
        categories=base.categories + added,
        untrained=(*base.untrained, *(name for name in info.untrained if name in added)),
        added_categories=len(added),
    )


def known_contexts(
    run: Run, model: Model, info: ConditioningInfo, dataset: Dataset
) -> KnownContexts:
    """Return values of the model's contexts that its base knows and the new images do not have.

    Args:
        model: before its first step.
    """
    prompts = () if run.preservation is None else run.preservation.prompts
    values = {
        name: value
        for name, context in user_contexts(model.conditioner).items()
        if (value := context.known_values(info, dataset, prompts)) is not None
    }
    count = max(map(len, values.values()), default=0)
    return KnownContexts(
        values={
            name: reorder({name: value}, [i % len(value) for i in range(count)])[name]
            for name, value in values.items()
        },
        count=count,
        base_of=run.adapter.base_of(model),
    )
