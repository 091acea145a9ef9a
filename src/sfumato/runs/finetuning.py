"""The run that fine-tunes a model on images: settings, and why they are so."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sfumato import config as configuration
from sfumato.adapters import Adapter
from sfumato.contexts import CONTEXTS, ContextConfig, Text
from sfumato.data import DataConfig, Listing, listed, sampled, source_at
from sfumato.data.holdout import expected_holdout
from sfumato.data.missing_labels import fill_missing
from sfumato.errors import ConfigError
from sfumato.recipes.resolver import Overrides, ResolvedConfig, resolve_config
from sfumato.recipes.run import Run
from sfumato.recipes.survey import Survey
from sfumato.runs.initial_adapter import require_same_settings
from sfumato.runs.model_folder import model_folder
from sfumato.runs.starting_point import converted, starting_point, with_lora_file
from sfumato.training import (
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
class Finetuning:
    """A fine-tuning before its overrides.

    Attributes:
        run: its configuration.
        lines: a line for each choice.
        listing: of the images.
    """

    run: Run
    lines: tuple[str, ...]
    listing: Listing

    def resolved(self, overrides: Overrides) -> ResolvedConfig:
        """Return the configuration with the overrides; the images are not listed again."""
        return replace(
            resolve_config(self.run, overrides), listed=self.run.data.source, listing=self.listing
        )


def choose_finetuning(
    model: str | Path,
    source: str,
    overrides: Overrides = (),
    *,
    lora: str | Path | None = None,
    partial: bool = False,
    variant: str = "",
    like: str | Path | None = None,
) -> Finetuning:
    """Choose the settings of a fine-tuning.

    Args:
        model: a run's directory, a pipeline's folder in diffusers' layout, the name of one on the
            Hugging Face hub, or a single file.
        source: images, as `train` takes them.
        overrides: settings that will be applied to the run; those of `data` decide what is there.
        lora: a LoRA file to go on from: rank, alpha and layers are the file's.
        partial: whether tensors of the file that fit no layer are left out.
        variant: of a pipeline's weights, e.g. "fp16".
        like: for a single file, a pipeline's folder of the same family.
    Raises:
        ConfigError: if the model is neither, or needs captions that the images lack; or if
            overrides contradict a LoRA that is continued.
        CheckpointError: if the LoRA file cannot be read or does not fit.
        DataError: if there are no images.
    """
    folder = model_folder(model, variant=variant, like=like)
    start = starting_point(folder, variant=variant)
    if like is not None:
        start = converted(start, Path(model), folder)
    if lora is not None:
        asked = configuration.with_overrides({}, overrides).get("adapter")
        texts = not isinstance(asked, dict) or asked.get("text_encoders") is not False
        start = with_lora_file(start, Path(lora), partial=partial, trains_texts=texts)
    images = source_at(source)
    own = start.run.data.of_other(images)
    data = _data(own, overrides)
    _require_legal_sizes(data, start.multiple)
    given = listed(data.source)
    listing = fill_missing(given, caption=data.caption, category=data.category)
    listing = sampled(listing, data.limit)
    count = len(listing.entries)
    captioned = sum(bool(entry.captions) for entry in listing.entries)
    _require_contexts(start.run, folder, source, listing)
    small = count <= SMALL_SET
    rank = RANK if small else LARGE_RANK
    continued = bool(start.adapter.initial)
    proposed = start.adapter if continued else replace(start.adapter, rank=rank)
    adapter = _adapter(replace(start.run, adapter=proposed), overrides)
    _require_new_contexts(start.run, folder, adapter)
    if continued:
        require_same_settings(adapter, start.adapter)
    learning_rate = adapter.learning_rate or start.learning_rate
    # what the base predicts would undo what a LoRA file changes; a run goes on as it was trained
    preservation = start.run.preservation if continued else None
    if small and not adapter.keeps_known and not continued:
        preservation = PreservationConfig()
    batch_size = min(start.batch_size, count)
    trained = max(1, count - expected_holdout(count, data.holdout))
    steps = min(MAX_STEPS, max(100, VIEWS * trained // batch_size))
    run = replace(
        start.run,
        name=f"{Path(source).resolve().stem or 'images'}-{start.run.name}",
        data=own,
        adapter=adapter,
        preservation=preservation,
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
        *_choices(run, trained=trained, captioned=bool(captioned), overrides=overrides),
        *(
            f"{name}s steer the model too (conditioner.{name}): made from images that have none"
            for name in adapter.contexts
            if name not in start.run.conditioner.names
        ),
    ]
    lines = (*start.remarks, *(f"chosen: {reason}" for reason in reasons))
    return Finetuning(run=run, lines=lines, listing=given)


def _choices(run: Run, *, trained: int, captioned: bool, overrides: Overrides) -> list[str]:
    """Return a line for each choice that no override replaces.

    Args:
        trained: number of images without those held out.
    """
    settings = configuration.with_overrides({}, overrides)
    steps, rates = run.budget.steps or 0, settings.get("optimizer") or {}
    views = round(steps * run.batch_size / trained)
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
    if run.adapter.begins_with:
        return (
            "no preservation: it would draw the model to the base without the LoRA that is "
            "continued (preservation.weight=1 does)"
        )
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
