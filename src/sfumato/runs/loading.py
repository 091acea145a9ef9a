"""Loading of trained runs, for sampling and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from sfumato import config as configuration
from sfumato.conditioners import ConditioningInfo
from sfumato.errors import CheckpointError, ConfigError, RunError
from sfumato.foreign_models import is_pipeline_folder
from sfumato.generation.diffusion_model import Model
from sfumato.generation.pipeline import Pipeline
from sfumato.interop.hub import is_model_name
from sfumato.interop.opening import open_folder
from sfumato.observability.progress import console
from sfumato.recipes.model import build_model
from sfumato.recipes.resolver import resolve
from sfumato.recipes.run import Run
from sfumato.recipes.run_origin import require_leave
from sfumato.runs.base import base_loader, require_base
from sfumato.runs.model_folder import model_folder
from sfumato.runs.preparation import open_data
from sfumato.runs.recommended import recommended
from sfumato.runs.weights import Weights, chosen_weights
from sfumato.storage import checkpoint
from sfumato.storage.base_parts import PARTS, require_same_parts
from sfumato.storage.run_directory import RunDirectory
from sfumato.storage.untrusted import image_shape
from sfumato.storage.weight_files import refuse_pickle
from sfumato.training import post_hoc_ema
from sfumato.training.monitors import Validator
from sfumato.training.parameters import frozen_tensors
from sfumato.training.precision import CHOICES, DTYPES, default_device


def generated_folder(path: Path) -> Path:
    """Return the folder for the images of a model: inside a run, else in the working directory.

    A model folder of another program is never written to, nor is that of a single file.

    Raises:
        RunError: if it is neither.
        CheckpointError: for a pickle, which can run code.
    """
    refuse_pickle(path)
    if path.is_file():
        return Path("generated") / path.stem
    if is_pipeline_folder(path) or is_model_name(path):
        return Path("generated") / path.resolve().name
    return RunDirectory.existing(path).path / "generated"


def newest_run(root: Path = Path("runs")) -> Path:
    """Return the run directory below `root` that was written to last.

    Raises:
        RunError: if there is none.
    """
    runs = [path.parent for path in root.glob("*/config.yaml")]
    if not runs:
        raise RunError(
            "no run to sample from",
            where=str(root),
            hint="name a run directory, or train one: sfumato train digits",
        )
    return max(runs, key=lambda run: max(path.stat().st_mtime for path in run.iterdir()))


def snapshot(path: str | Path, step: int) -> Model:
    """Load the model of a run as it was at `step`, or at the last snapshot before it.

    Autoguidance leads away from it.
    """
    directory = RunDirectory.existing(Path(path))
    model = load_own(directory).model
    load_weights(
        model, checkpoint.load_snapshot(directory.snapshots, step=step), model.state_dict()
    )
    return model


def width_errors(
    path: str | Path, widths: Sequence[float]
) -> Iterator[tuple[float, dict[str, Any]]]:
    """Yield the held-out errors of reconstructed averages of several widths.

    Raises:
        CheckpointError: if the run stored no averages to reconstruct them from.
    """
    directory, settings = RunDirectory.existing(Path(path)), resolve(path)
    pipeline = load_own(directory)
    model = pipeline.model
    validator = Validator(
        config=settings,
        dataset=open_data(settings, directory=directory.path),
        schedule=settings.objective.schedule,
        conditioner=model.conditioner,
        autoencoder=pipeline.autoencoder,
        device=default_device(),
    )
    for width in widths:
        load_weights(
            model, post_hoc_ema.reconstruct(directory.averages, width=width), model.state_dict()
        )
        yield width, validator.error(model)


def load_weights(model: Model, trained: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> None:
    """Load the trained and the frozen parameters, without the parts that only training uses.

    Raises:
        CheckpointError: if they do not fit.
    """
    tensors = {
        name: tensor
        for name, tensor in {**frozen, **trained}.items()
        if not name.startswith("auxiliary.")
    }
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights do not fit the model: {' '.join(str(error).split())[:300]}",
            where="checkpoint",
            hint="copy the run again, its config.yaml included",
        ) from None


def _rebuild(
    settings: Run, info: ConditioningInfo, directory: RunDirectory, loaded: checkpoint.Checkpoint
) -> tuple[Model, dict[str, Tensor]]:
    """Build the model of a run, and return its frozen parameters with it.

    Raises:
        CheckpointError: if the base of an adapter is missing, or not the one that it was trained
            with.
    """
    if not settings.adapter.needs_base:
        model = build_model(settings.from_scratch(), info, directory.path)
        _require_encoders(model, loaded)
        return _for_sampling(model), checkpoint.load_frozen(loaded.path, loaded.state)
    require_base(settings)
    model = build_model(settings, info, directory.path, load_base=base_loader(settings))
    frozen = frozen_tensors(model)
    if not settings.has_base:
        frozen = checkpoint.load_frozen(loaded.path, loaded.state)
    checkpoint.require_frozen(loaded, frozen)
    _require_encoders(model, loaded)
    return _for_sampling(model), frozen


def _require_encoders(model: Model, loaded: checkpoint.Checkpoint) -> None:
    """Raise CheckpointError if the text encoders of a run's base have changed; the run has its own
    copy of the autoencoder.
    """
    require_same_parts(
        loaded.state.get(PARTS, {}), model.conditioner.base_parts(), where=str(loaded.path)
    )


def _for_sampling(model: Model) -> Model:
    return model.eval().requires_grad_(False)


def load(
    path: str | Path,
    *,
    weights: Weights = "auto",
    precision: Literal["float32", "bfloat16"] = "float32",
    variant: str = "",
    like: str | Path | None = None,
) -> Pipeline:
    """Load the pipeline of a run's newest whole checkpoint, of a model of diffusers, or of a single
    file of Stable Diffusion's layout.

    Newer checkpoints that are damaged cause a warning, and are left as they are.

    Args:
        path: a run directory, a model folder of diffusers, or the name of one on the Hugging Face
            hub, "owner/name".
        weights: `ema`, the averaged ones; `raw`, those of the last step; `best`, those of the
            step that the verdict names; `auto`, `best` where the last step is worse, else `ema`;
            or the width of an average, if the run stored averages to
            reconstruct it from (`post_hoc_ema.widths`). Where a sweep recommends a setting,
            `auto` are its weights, and its guidance and steps are the pipeline's defaults.
        precision: precision inside the network.
        variant: which weights of a model folder, where it has several: "fp16" for *.fp16.safetensors.
        like: for a single file, a pipeline's folder of the same family, of which configurations,
            tokenizers and parts that the file lacks are used.
    Raises:
        RunError, CheckpointError: if this is not a run, or it has no usable checkpoint.
        ConfigError: for unknown weights or an unknown precision, or a part of a diffusers model
            that is not supported.
    """
    if precision not in CHOICES:
        raise ConfigError(
            f"precision = {precision!r}", where="load", hint=f"choose among {', '.join(CHOICES)}"
        )
    folder = model_folder(path, variant=variant, like=like)
    if is_pipeline_folder(folder):
        return _load_folder(folder, weights=weights, precision=precision, variant=variant)
    if variant:
        raise ConfigError(
            f"variant = {variant!r}",
            where=str(path),
            hint="leave it out: only model folders of diffusers have variants; for a run, see "
            "`weights`",
        )
    directory = RunDirectory.existing(folder)
    weights, sampling = recommended(directory, resolve(directory.path).sampling, weights)
    return replace(load_own(directory, weights=weights, precision=precision), sampling=sampling)


def load_own(
    directory: RunDirectory,
    *,
    weights: Weights = "auto",
    precision: Literal["float32", "bfloat16"] = "float32",
) -> Pipeline:
    """Load the pipeline of a run's newest whole checkpoint, with the run's own sampling settings,
    whatever a sweep recommends; for arguments, see `load`.
    """
    settings = resolve(directory.path)
    require_leave(directory.path, settings, data=False)
    loaded, warnings = checkpoint.read_newest(directory.checkpoints)
    for warning in warnings:
        console().print(f"warning: {warning}", markup=False)
    info = configuration.parse(ConditioningInfo, loaded.state.get("facts"), where=str(loaded.path))
    model, frozen = _rebuild(settings, info, directory, loaded)
    load_weights(model, chosen_weights(weights, loaded, directory), frozen)
    channels, height, width = image_shape(loaded.state, where=loaded.path)
    pipeline = Pipeline(
        model=model,
        autoencoder=settings.autoencoder.load(directory.path, channels),
        sampling=settings.sampling,
        info=info,
        image_shape=(channels, height, width),
    )
    return _placed(pipeline, precision)


def _placed(pipeline: Pipeline, precision: Literal["float32", "bfloat16"]) -> Pipeline:
    """Return a pipeline on the default device."""
    return replace(
        pipeline,
        model=pipeline.model.to(default_device()),
        autoencoder=pipeline.autoencoder.to(default_device()),
        compute_dtype=DTYPES[precision],
    )


def _load_folder(
    folder: Path,
    *,
    weights: Weights,
    precision: Literal["float32", "bfloat16"],
    variant: str,
) -> Pipeline:
    """Load the pipeline of a model folder in diffusers' layout."""
    if weights not in ("auto", "ema"):
        raise ConfigError(
            f"weights = {weights!r}",
            where=str(folder),
            hint="leave it out: a model folder of diffusers holds one set of weights",
        )
    pipeline, content = open_folder(folder, variant=variant)
    for remark in content.remarks:
        console().print(f"note: {remark}", markup=False)
    return _placed(pipeline, precision)
