"""A run in one folder that sfumato opens on any machine: a run's directory with the averaged weights
alone, and everything else that sampling needs.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato import config as configuration
from sfumato.conditioners import PipelineTextConfig, PretrainedTextConfig
from sfumato.errors import OutputError, without_secrets
from sfumato.foreign_models import PIPELINE
from sfumato.interop.base_folder import BaseFolder, copy_files
from sfumato.interop.merging import NAMES, require_dtype, round_tensor
from sfumato.interop.model_card import write_card
from sfumato.interop.opening import drawings, largest_difference, open_run
from sfumato.interop.trained_model import TrainedModel
from sfumato.networks.diffusers_models import DiffusersConfig
from sfumato.recipes.autoencoder_stage import FINAL, FOLDER, PixelsConfig
from sfumato.recipes.paths import FROM_RUN, path_entries
from sfumato.recipes.resolver import resolve
from sfumato.recipes.run import Run
from sfumato.recipes.run_config import write_run_config
from sfumato.storage import checkpoint
from sfumato.storage.atomic import atomic_folder
from sfumato.storage.output_paths import require_free
from sfumato.storage.run_directory import BUNDLE, RunDirectory

# of data.json: numbers about the training set, and no names of files
RECORDED = (
    "source",
    "attribution",
    "images",
    "training",
    "holdout",
    "categories",
    "captioned",
    "shapes",
    "value_range",
)
TEXT_PATHS = ("conditioner.text.path", "conditioner.text.encoder")


def write_bundle(model: TrainedModel, out: Path, dtype: torch.dtype) -> list[str]:
    """Write a run as a folder that `sfumato.load` opens on any machine, whatever it was made from.

    It has the averaged weights of the whole model, base and adapters apart, the configuration, the
    autoencoder, and text encoders that are folders here. It has no optimizer and no training data,
    and no path of this machine. In float32 its images are those of the run bit for bit.

    Args:
        out: the new folder.
        dtype: of the weights.
    Returns:
        Lines that say what is in it, what is not, and what was compared.
    Raises:
        ConfigError: naming a tensor that overflows in `dtype`.
        CheckpointError: if the text encoders are gone.
        OutputError: if `out` exists already, or the folder gives other images than the run.
    """
    require_free(out)
    require_dtype(dtype)
    tensors = {
        name: round_tensor(name, tensor.detach().cpu(), dtype)
        for name, tensor in model.pipeline.model.state_dict().items()
    }
    with atomic_folder(out) as folder:
        lines = [
            f"weights: {len(tensors)} tensors in {NAMES[dtype]}, averaged, of step {model.step}"
        ]
        plain, relative = portable(model.run)
        lines += _copy_text(model.run, plain, relative, folder)
        lines += _copy_autoencoder(model, folder)
        _write_run(model, folder, plain, relative, tensors)
        same = _compared(model, folder, dtype, out)
        write_card(model, folder, "pip install sfumato\nsfumato sample FOLDER --num 4")
    return [*lines, "not in it: the optimizer and the training data", same]


def portable(run: Run) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a run's configuration without paths of this machine, and an empty map of new ones.

    Paths to what a bundle does not hold keep their last part, which says what they were.
    """
    plain = configuration.plain(run.from_scratch())  # the base is in the bundle
    for _, holder, name in path_entries(plain):
        holder[name] = Path(holder[name]).name
    if isinstance(run.network, DiffusersConfig):
        plain["network"]["variant"] = ""
    return plain, {}


def _copy_text(
    run: Run, plain: dict[str, Any], relative: dict[str, str], folder: Path
) -> list[str]:
    """Copy the text encoders that are folders here; others are found by their names.

    A copy's name has a hash in it, so that no other folder is taken for it.
    """
    text = run.conditioner.text
    if isinstance(text, PipelineTextConfig):
        base = BaseFolder.read(Path(text.path))
        name = _name(base.path)
        (folder / name).mkdir()
        shutil.copyfile(base.path / PIPELINE, folder / name / PIPELINE)
        for part in base.text_parts:
            base.copy_part(part, folder / name / part)
        plain["conditioner"]["text"]["path"] = relative[TEXT_PATHS[0]] = name
        return [f"text encoders and tokenizers: copies of those of {base.path.name}"]
    if not isinstance(text, PretrainedTextConfig):
        return []
    source = Path(text.encoder)
    if not source.is_dir():
        plain["conditioner"]["text"]["encoder"] = text.encoder
        return [f"text encoder: not in it, but found by its name, {text.encoder}"]
    name = _name(source)
    copy_files(source, folder / name)
    plain["conditioner"]["text"]["encoder"] = relative[TEXT_PATHS[1]] = name
    return [f"text encoder: a copy of {source.name}"]


def _name(source: Path) -> str:
    digest = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:12]
    return f"text-{digest}"


def _copy_autoencoder(model: TrainedModel, folder: Path) -> list[str]:
    if isinstance(model.run.autoencoder, PixelsConfig):
        return []
    shutil.copytree(model.directory / FOLDER / FINAL, folder / FOLDER / FINAL)
    return ["autoencoder: the run's own copy"]


def _write_run(
    model: TrainedModel,
    folder: Path,
    plain: dict[str, Any],
    relative: dict[str, str],
    tensors: dict[str, Tensor],
) -> None:
    """Write the configuration, the data record, the state and the one checkpoint."""
    directory = RunDirectory(folder)
    write_run_config(directory, plain)
    record = RunDirectory(model.directory).data_record()
    kept = {name: record[name] for name in RECORDED if name in record}
    directory.write_json("data.json", {**kept, FROM_RUN: relative})
    directory.write_json(BUNDLE, {"step": model.step})
    directory.write_json("status.json", {"state": "finished", "step": model.step})
    pipeline = model.pipeline
    checkpoint.save(
        directory.checkpoints,
        step=model.step,
        state={
            "counters": {"step": model.step},
            "facts": asdict(pipeline.info),
            "image_shape": list(pipeline.image_shape),
            "frozen": "",
            "config": without_secrets(plain),
        },
        tensors={"ema": tensors},
        keep=1,
    )


def _compared(model: TrainedModel, folder: Path, dtype: torch.dtype, out: Path) -> str:
    """Open the bundle and compare an image of it; return a line that says so.

    Raises:
        OutputError: if it was written in float32 and they differ at all.
    """
    loaded, _ = checkpoint.read_newest(folder / "checkpoints")
    pipeline = open_run(resolve(folder), folder, loaded.state, loaded.tensors["ema"])
    difference = largest_difference(model.pipeline, pipeline, **drawings(model.pipeline))
    if dtype is torch.float32 and difference != 0:
        raise OutputError(
            f"the bundle gives other images than the run ({difference:.1e} of 0 to 1)",
            where=str(out),
            hint="nothing was written; please report this, with the run's config.yaml",
        )
    rounded = "" if dtype is torch.float32 else ", by rounding"
    return f"reopened: one image differs from the run's by {difference:.1e} (of 0 to 1){rounded}"
