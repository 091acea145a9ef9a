"""What a fine-tuning starts from: a run, a pipeline's folder, and perhaps a LoRA."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sfumato import config as configuration
from sfumato.adapters import LoRA
from sfumato.conditioners import ConditioningInfo
from sfumato.errors import ConfigError
from sfumato.foreign_models import is_pipeline_folder
from sfumato.interop.diffusers_folder import read_folder
from sfumato.recipes.autoencoder_stage import PixelsConfig, PretrainedAutoencoder, trained_folder
from sfumato.recipes.resolver import resolve
from sfumato.recipes.run import Run
from sfumato.runs.base import read_base, require_base
from sfumato.runs.initial_adapter import initial_of_run, outline, read_initial
from sfumato.storage.weight_files import refuse_pickle
from sfumato.training import AuxiliaryConfig

# of pipelines of diffusers, and of runs of ours
PIPELINE_RATE, PIPELINE_BATCH, RUN_RATE = 1e-4, 4, 1e-3


@dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """What a fine-tuning starts from.

    Attributes:
        run: the model's configuration; its data and its training are replaced.
        info: what its conditioner is built from.
        adapter: that is proposed; one that begins with given values is kept as it is.
        learning_rate: that suits it.
        batch_size: largest one that is proposed.
        multiple: what sides of images must be a multiple of: the factor of the autoencoder, times
            the side of the network's patches if it has any.
        remarks: lines that say what was replaced or left out.
    """

    run: Run
    info: ConditioningInfo
    adapter: LoRA
    learning_rate: float
    batch_size: int
    multiple: int = 1
    remarks: tuple[str, ...] = ()


def starting_point(model: Path, *, variant: str = "") -> StartingPoint:
    """Read a run, or a pipeline's folder in diffusers' layout.

    A run with a LoRA is continued: its base stays the base, and its LoRA's values are the first.

    Args:
        variant: of the folder's weights, e.g. "fp16".
    Raises:
        ConfigError: if it is neither, or cannot be fine-tuned.
        CheckpointError: if it is not whole.
    """
    refuse_pickle(model)
    if is_pipeline_folder(model):
        content = read_folder(model, variant=variant)
        return StartingPoint(
            run=content.run,
            info=content.info,
            adapter=LoRA(),
            learning_rate=PIPELINE_RATE,
            batch_size=PIPELINE_BATCH,
            multiple=content.info.factor * _patch(content.run),
            remarks=content.remarks,
        )
    if variant:
        raise ConfigError(
            f"variant = {variant!r}",
            where=str(model),
            hint="leave it out: only model folders of diffusers have variants",
        )
    if not (model / "config.yaml").is_file():
        raise ConfigError(
            "is neither a run, since it has no config.yaml, nor a pipeline's folder, since it has "
            "no model_index.json",
            where=str(model),
            hint="name a run, or a folder that diffusers wrote with save_pretrained",
        )
    if resolve(model).adapter.needs_base:
        return _continued(model)
    base = read_base(model)
    return StartingPoint(
        run=replace(_with_own_parts(base.run, base.info, model), base=str(model)),
        info=base.info,
        adapter=LoRA(convolutions=True),
        learning_rate=RUN_RATE,
        batch_size=min(16, base.run.batch_size),
    )


def _continued(model: Path) -> StartingPoint:
    """Return the starting point that a run with a LoRA is."""
    run, initial = resolve(model), initial_of_run(model)
    require_base(run)
    assert initial.info is not None
    base = run.base or run.network.origin
    return StartingPoint(
        run=_with_own_parts(run, initial.info, model),
        info=initial.info,
        adapter=initial.adapter,
        learning_rate=RUN_RATE if run.base else PIPELINE_RATE,
        batch_size=min(16, run.batch_size) if run.base else PIPELINE_BATCH,
        multiple=1 if run.base else initial.info.factor * _patch(run),
        remarks=(
            f"goes on from the LoRA of {model} (hash {initial.adapter.initial_hash[:12]}): its "
            "values are the first, and its rank, alpha and layers are kept; there is one LoRA, "
            "not two",
            f"the base stays {base}: gains, and what is forgotten, are measured against it, "
            "without any LoRA",
        ),
    )


def _with_own_parts(run: Run, info: ConditioningInfo, model: Path) -> Run:
    """Return the run with its categories first, its autoencoder, and no auxiliary losses."""
    folder, space = trained_folder(model), run.autoencoder
    return replace(
        run,
        data=replace(run.data, categories=info.categories),
        autoencoder=space
        if isinstance(space, PixelsConfig)
        else PretrainedAutoencoder(path=str(folder), statistics="own"),
        auxiliary=AuxiliaryConfig(),
    )


def _patch(run: Run) -> int:
    """Return the side of the patches that a network of diffusers reads."""
    return int(configuration.plain(run.network)["settings"].get("patch_size") or 1)


def with_lora_file(
    start: StartingPoint, lora: Path, *, partial: bool, trains_texts: bool
) -> StartingPoint:
    """Return the starting point with the values of a LoRA file as the first ones.

    Args:
        trains_texts: whether text encoders may be trained.
    Raises:
        ConfigError: if it has a LoRA of its own.
        CheckpointError: if the file cannot be read or does not fit.
    """
    if start.adapter.initial:
        raise ConfigError(
            f"{start.adapter.initial} has a LoRA of its own, and a run has one",
            where=f"--lora {lora}",
            hint="leave --lora out, or name the base without a LoRA",
        )
    network, conditioner = outline(start.run, start.info)
    initial = read_initial(lora, network, conditioner if trains_texts else None, partial=partial)
    adapter = initial.adapter
    scale = "" if adapter.alpha is None else f", alpha {adapter.alpha:g}"
    lines = (
        f"goes on from {lora} (hash {adapter.initial_hash[:12]}): its values are the first, and "
        f"its rank {adapter.rank}{scale} and its {len(initial.tensors) // 2} layers are kept",
        "gains, and what is forgotten, are measured against the base without this LoRA",
    )
    return replace(start, adapter=adapter, remarks=(*lines, *initial.remarks, *start.remarks))


def converted(start: StartingPoint, file: Path, folder: Path) -> StartingPoint:
    """Return the starting point of a folder that a single file was converted to.

    It has the file's name, and a remark that the run needs the folder.
    """
    return replace(
        start,
        run=replace(start.run, name=file.stem),
        remarks=(
            *start.remarks,
            f"{file.name} was converted to {folder}, which the run needs as long as it is used "
            "(sample it once with --like to make the folder again)",
        ),
    )
