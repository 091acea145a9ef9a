"""The run that fine-tunes a model on images: settings, and why they are so."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sfumato import config as configuration
from sfumato.adapters import Adapter, LoRA
from sfumato.contexts import CONTEXTS, ContextConfig, Text
from sfumato.data import DataConfig, Listing, source_at
from sfumato.data.missing_labels import fill_missing
from sfumato.errors import ConfigError
from sfumato.foreign_models import is_pipeline_folder
from sfumato.interop.diffusers_folder import read_folder
from sfumato.recipes.autoencoder_stage import PixelsConfig, PretrainedAutoencoder, trained_folder
from sfumato.recipes.resolver import Overrides
from sfumato.recipes.run import Run
from sfumato.recipes.survey import Survey
from sfumato.runs.base import read_base
from sfumato.storage.weight_files import refuse_pickle
from sfumato.training import (
    AuxiliaryConfig,
    Budget,
    OptimizerConfig,
    PowerEMA,
    PreservationConfig,
    PreviewConfig,
    ValidationConfig,
)

SMALL_SET, RANK, LARGE_RANK = 30, 16, 32
VIEWS = 100  # of each image, at which small sets are learned
MAX_STEPS = 5000
LOOKS = 12  # comparisons with the base
DROPOUT = 0.05


@dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """What a fine-tuning starts from.

    Attributes:
        run: the model's configuration; its data and its training are replaced.
        adapter: that is proposed.
        learning_rate: that suits it.
        batch_size: largest one that is proposed.
        multiple: what sides of images must be a multiple of: the factor of the autoencoder, times
            the side of the network's patches if it has any.
        remarks: lines that say what was replaced or left out.
    """

    run: Run
    adapter: LoRA
    learning_rate: float
    batch_size: int
    multiple: int = 1
    remarks: tuple[str, ...] = ()


def starting_point(model: Path) -> StartingPoint:
    """Read a run, or a pipeline's folder in diffusers' layout.

    Raises:
        ConfigError: if it is neither, or cannot be fine-tuned.
        CheckpointError: if it is not whole.
    """
    refuse_pickle(model)
    if is_pipeline_folder(model):
        content = read_folder(model)
        patch = configuration.plain(content.run.network)["settings"].get("patch_size")
        return StartingPoint(
            run=content.run,
            adapter=LoRA(),
            learning_rate=1e-4,
            batch_size=4,
            multiple=content.info.factor * int(patch or 1),
            remarks=content.remarks,
        )
    if not (model / "config.yaml").is_file():
        raise ConfigError(
            "is neither a run, since it has no config.yaml, nor a pipeline's folder, since it has "
            "no model_index.json",
            where=str(model),
            hint="name a run, or a folder that diffusers wrote with save_pretrained",
        )
    base = read_base(model)
    folder, space = trained_folder(model), base.run.autoencoder
    run = replace(
        base.run,
        base=str(model),
        data=replace(base.run.data, categories=base.info.categories),
        autoencoder=space
        if isinstance(space, PixelsConfig)
        else PretrainedAutoencoder(path=str(folder), statistics="own"),
        auxiliary=AuxiliaryConfig(),
    )
    return StartingPoint(
        run=run,
        adapter=LoRA(convolutions=True),
        learning_rate=1e-3,
        batch_size=min(16, base.run.batch_size),
    )


def finetuning_run(model: Path, source: str, overrides: Overrides = ()) -> tuple[Run, list[str]]:
    """Return the run, and a line for each choice.

    Args:
        model: a run's directory, or a pipeline's folder in diffusers' layout.
        source: images, as `train` takes them.
        overrides: settings that will be applied to the run; those of `data` decide what is there.
    Raises:
        ConfigError: if the model is neither, or needs captions that the images lack.
        DataError: if there are no images.
    """
    start = starting_point(model)
    images = source_at(source)
    data = _data(replace(start.run.data, source=images), overrides)
    _require_legal_sizes(data, start.multiple)
    listing = fill_missing(data.source.listing(), caption=data.caption, category=data.category)
    count = len(listing.entries)
    captioned = sum(bool(entry.captions) for entry in listing.entries)
    _require_contexts(start.run, model, source, listing)
    small = count <= SMALL_SET
    rank = RANK if small else LARGE_RANK
    adapter = _adapter(replace(start.run, adapter=replace(start.adapter, rank=rank)), overrides)
    _require_new_contexts(start.run, model, adapter)
    learning_rate = adapter.learning_rate or start.learning_rate
    preserved = small and not adapter.keeps_known
    batch_size = min(start.batch_size, count)
    steps = min(MAX_STEPS, max(100, VIEWS * count // batch_size))
    run = replace(
        start.run,
        name=f"{Path(source).resolve().stem or 'images'}-{start.run.name}",
        data=replace(start.run.data, source=images),
        adapter=adapter,
        preservation=PreservationConfig() if preserved else None,
        conditioner=_with_contexts(_with_dropout(start.run.conditioner), adapter),
        optimizer=OptimizerConfig(
            learning_rate=learning_rate,
            weight_decay=0.0,
            schedule="constant",
            warmup_steps=steps // 20,
        ),
        ema=PowerEMA(0.1),
        batch_size=batch_size,
        micro_batch=None,
        budget=Budget(steps=steps),
        preview=PreviewConfig(num=4),
        validation=ValidationConfig(
            samples=min(128, 8 * count), every_steps=max(1, steps // LOOKS)
        ),
    )
    reasons = [
        f"{count} images, {captioned} with a caption",
        *_conversion(listing, data.channels),
        *_choices(run, count=count, captioned=bool(captioned), overrides=overrides),
        *(
            f"{name}s steer the model too (conditioner.{name}): made from images that have none"
            for name in adapter.contexts
            if name not in start.run.conditioner.names
        ),
    ]
    return run, [*start.remarks, *(f"chosen: {reason}" for reason in reasons)]


def _choices(run: Run, *, count: int, captioned: bool, overrides: Overrides) -> list[str]:
    """Return a line for each choice that no override replaces.

    Args:
        count: number of images.
    """
    settings = configuration.with_overrides({}, overrides)
    steps, rates = run.budget.steps or 0, settings.get("optimizer") or {}
    views = round(steps * run.batch_size / max(1, count - max(count // 10, min(25, count // 5))))
    rate = f", learning rate {run.optimizer.learning_rate:g}, constant"
    kept = ": the base stays as it is (adapter.kind=none trains all weights)"
    choices = {
        "budget batch_size": f"{steps} steps of {run.batch_size}: each image is seen about {views} "
        f"times, and the model is compared with its base {LOOKS} times",
        "preservation": _preservation_line(run),
        "conditioner": f"{DROPOUT:.0%} of captions are replaced by the null condition, for guidance"
        if captioned
        else "",
    }
    return [
        # the adapter has the overrides in it already
        run.adapter.described
        + ("" if "learning_rate" in rates else rate)
        + (kept if run.adapter.needs_base else ""),
        *(text for keys, text in choices.items() if text and not settings.keys() & keys.split()),
    ]


def _preservation_line(run: Run) -> str:
    if run.preservation is not None:
        return (
            "preservation: what the base predicts for other contexts is kept (preservation=null "
            "does not)"
        )
    if run.adapter.keeps_known:
        return "no preservation, since nothing that the base knows can change"
    return (
        f"no preservation, since there are more than {SMALL_SET} images (preservation.weight=1 "
        "keeps what the base knows)"
    )


def _require_contexts(run: Run, model: Path, source: str, listing: Listing) -> None:
    """Raise ConfigError if the images lack what the model is conditioned on."""
    count = len(listing.entries)
    captioned = any(entry.captions for entry in listing.entries)
    if run.conditioner.text is not None and not captioned:
        raise ConfigError(
            f"{model.name} is conditioned on text, and none of {count} images has a caption"
            + "".join(f"\n  note: {remark}" for remark in listing.remarks),
            where=source,
            hint='give all of them one: data.caption="a photo of NAME", where NAME is a word for '
            "what they show; or put a .txt with a caption beside each image",
        )
    if run.conditioner.category is not None and not any(e.category for e in listing.entries):
        raise ConfigError(
            f"{model.name} is conditioned on categories, and none of {count} images has one",
            where=source,
            hint="give all of them one, new or known: data.category=NAME; or sort them into one "
            "sub-folder for each category",
        )


def _require_new_contexts(run: Run, model: Path, adapter: Adapter) -> None:
    """Raise ConfigError if a base reads already what an adapter would let it read."""
    for name in adapter.contexts:
        if name in run.conditioner.names:
            raise ConfigError(
                f"{model.name} is steered by {name}s already, and the adapter would add them",
                where="adapter.kind",
                hint="tune it with adapter.kind=lora or none",
            )


def _with_dropout(conditioner: ContextConfig) -> ContextConfig:
    """Return the conditioner with the dropout of fine-tuning, for text."""
    return ContextConfig(
        **{
            name: replace(config, dropout=min(DROPOUT, config.dropout))
            if name == Text.name
            else config
            for name in conditioner.names
            if (config := getattr(conditioner, name)) is not None
        }
    )


def _with_contexts(conditioner: ContextConfig, adapter: Adapter) -> ContextConfig:
    """Return the conditioner with the contexts that an adapter needs, where they are missing."""
    configured = {name: getattr(conditioner, name) for name in conditioner.names}
    needed = {
        name: CONTEXTS[name].config(**settings) for name, settings in adapter.contexts.items()
    }
    return ContextConfig(**{**needed, **configured})


def _data(data: DataConfig, overrides: Overrides) -> DataConfig:
    """Return the data's settings with those of the overrides that concern them."""
    settings = configuration.with_overrides({"data": configuration.plain(data)}, overrides)
    return configuration.parse(DataConfig, settings["data"], where="data")


def _adapter(run: Run, overrides: Overrides) -> Adapter:
    """Return the run's adapter with the overrides that concern it.

    Another kind keeps the settings that it shares with the proposed one.
    """
    plain = configuration.plain(run)
    chosen = configuration.with_overrides({"adapter": plain["adapter"]}, overrides)["adapter"]
    parsed: Any = configuration.parse(Run, {**plain, "adapter": chosen}).adapter
    names = {field.name for field in fields(parsed)} & plain["adapter"].keys()
    settings = chosen if isinstance(chosen, dict) else {}
    shared = {name: getattr(run.adapter, name) for name in names - settings.keys()}
    adapter: Adapter = replace(parsed, **shared)
    return adapter


def _require_legal_sizes(data: DataConfig, multiple: int) -> None:
    """Raise ConfigError unless the images' sides are multiples of what the model works in."""
    for side in sorted({side for shape in data.pixel_format().shapes for side in shape}):
        if side % multiple:
            below = side // multiple * multiple
            raise ConfigError(
                f"images of {side} pixels a side, and the model needs multiples of {multiple}",
                where="data.resolution",
                hint=f"use {f'{below} or ' if below else ''}{below + multiple}",
            )


def _conversion(listing: Listing, channels: int) -> list[str]:
    """Return a line on images that have other channels than the model, [] if none have."""
    survey = Survey.of(listing)
    if survey.channels == channels or not survey.side:
        return []
    names = {1: "gray", 2: "gray with alpha", 3: "RGB", 4: "RGB with alpha"}
    return [f"{survey.why}: they are converted to {names.get(channels, f'{channels} channels')}"]
