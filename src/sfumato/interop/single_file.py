"""A run in one file of Stable Diffusion's layout (SD 1 and 2, SDXL), which most programs load."""

from __future__ import annotations

import datetime
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sfumato.errors import ConfigError, OutputError
from sfumato.foreign_models import CONFIG
from sfumato.interop.base_folder import BaseFolder
from sfumato.interop.diffusers_export import FolderPlan, plan_folder, write_folder
from sfumato.interop.diffusers_folder import read_json
from sfumato.interop.ldm_names import TEXT, unet_rows, vae_rows
from sfumato.interop.merging import merge
from sfumato.interop.model_card import write_card
from sfumato.interop.opening import largest_difference, reopen, require_same
from sfumato.interop.single_file_layout import (
    ARCHITECTURES,
    LATENT_SCALES,
    PIPELINES,
    SUFFIX,
    TABLE,
    VELOCITY,
    ZERO_SNR,
    FileFacts,
    facts_of_names,
    text_prefixes,
    text_rows,
)
from sfumato.interop.single_file_reader import convert
from sfumato.interop.trained_model import TrainedModel
from sfumato.networks.diffusers_weights import weight_files
from sfumato.storage.atomic import atomic_path
from sfumato.storage.output_paths import require_free

# of keys that scheduler_config.json lacks
SCHEDULER_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
}


def write_single_file(model: TrainedModel, out: Path, dtype: torch.dtype) -> list[str]:
    """Write a run as one .safetensors file, with the changes merged into its weights, and a card
    beside it (.md).

    The autoencoder, and text encoders that were not trained, are those of the base, in their own
    precision. The file is read
    again, and its image is compared with one of the run.

    Args:
        out: the new file.
        dtype: of the network's weights.
    Returns:
        Lines that say what was written, what was compared, and what was lost.
    Raises:
        ConfigError: naming what of the run the layout does not have.
        CheckpointError: if the base is gone.
        OutputError: if `out` exists already, or the file gives other images than the run.
    """
    card, samples = out.with_suffix(".md"), out.with_suffix(".png")
    for path in (out, card, samples):
        require_free(path)
    if out.suffix != SUFFIX:
        raise OutputError(
            "a single file is written as .safetensors",
            where=str(out),
            hint=f"name it {out.with_suffix(SUFFIX).name}",
        )
    plan = plan_folder(model)
    facts = _facts_of(plan)
    merged = merge(model.run, plan.network, dtype, plan.texts)
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=out.parent, prefix=".tmp-") as place,
        atomic_path(out) as temporary,
    ):
        folder, again = Path(place) / "merged", Path(place) / "again"
        folder.mkdir()
        again.mkdir()
        write_folder(model, plan, merged, folder)
        tensors = file_tensors(folder) | _said(facts)
        save_file(tensors, temporary, metadata=_header(model, facts))
        if read_facts(temporary) != facts:
            raise OutputError(
                f"the file says {read_facts(temporary)}, and the run is {facts}", where=str(out)
            )
        convert(temporary, folder, again)
        difference = largest_difference(model.pipeline, reopen(again, model.run))
        same = require_same(difference, dtype, where=out)
    write_card(model, out.parent, how_to_run(out.name), name=card.name, samples=samples.name)
    say = [f"{facts.architecture}: {len(tensors)} tensors"]
    if facts.prediction == "v":
        say.append(f"the file says that it predicts velocity ({VELOCITY})")
    if facts.zero_snr:
        say.append(f"the file says that its schedule ends at pure noise ({ZERO_SNR})")
    say.append("sampler, steps and guidance are not part of a single file")
    return [*plan.lines, *merged.lines, *say, same]


def _facts_of(plan: FolderPlan) -> FileFacts:
    """Return what the file has to say by itself.

    Raises:
        ConfigError: for a pipeline or a prediction that the layout does not have.
    """
    kind = str(plan.index["_class_name"])
    prediction = str(plan.scheduler.get("prediction_type", "epsilon"))
    words = {"epsilon": "epsilon", "v_prediction": "v"}
    if kind not in PIPELINES or plan.base is None:
        raise ConfigError(
            f"single files are written of Stable Diffusion 1, 2 and XL, not of {kind}",
            where="export",
            hint="use the format `diffusers`",
        )
    if prediction not in words:
        raise ConfigError(
            f"a single file cannot say that its network predicts {prediction!r}",
            where="export",
            hint="use the format `diffusers`",
        )
    prefix = text_prefixes(plan.base)[-1][1]
    _require_taken_for_granted(plan, prefix)
    return FileFacts(
        architecture=ARCHITECTURES[prefix],
        prediction=words[prediction],
        zero_snr=bool(plan.scheduler.get("rescale_betas_zero_snr")),
    )


def _require_taken_for_granted(plan: FolderPlan, prefix: str) -> None:
    """Raise ConfigError for a schedule or a scale of latents that readers would not expect."""
    assert plan.autoencoder is not None
    latents = read_json(plan.autoencoder / CONFIG)
    wanted = {**TABLE, "scaling_factor": LATENT_SCALES[prefix], "shift_factor": None}
    actual = {**SCHEDULER_DEFAULTS, **plan.scheduler, "scaling_factor": 0.18215, **latents}
    for key, value in wanted.items():
        if (actual.get(key) or None) != value:
            raise ConfigError(
                f"a single file cannot say that {key} is {actual.get(key)}: programs take "
                f"{value} for granted",
                where="export",
                hint="use the format `diffusers`",
            )


def file_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a pipeline's folder under the names of a single file."""
    base = BaseFolder.read(folder)
    tensors: dict[str, Tensor] = {}
    network = _tensors(folder / "unet")
    for row in unet_rows(network, read_json(folder / "unet" / CONFIG)):
        tensors[row.file] = row.join(network)
    vae = {_current(name): tensor for name, tensor in _tensors(folder / "vae").items()}
    for row in vae_rows(vae, read_json(folder / "vae" / CONFIG)):
        tensors[row.file] = row.join(vae)
    for part, prefix in text_prefixes(base):
        text = _read(folder / part / "model.safetensors")
        known = [name for name in text if name.startswith((TEXT, "text_projection"))]
        for row in text_rows(known, prefix):
            tensors[row.file] = row.join(text)
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def _current(name: str) -> str:
    """Return a tensor's current name; attention layers of autoencoders once had others."""
    for old, new in {
        "query": "to_q",
        "key": "to_k",
        "value": "to_v",
        "proj_attn": "to_out.0",
    }.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in weight_files(folder) for name, tensor in _read(file).items()}


def _read(file: Path) -> dict[str, Tensor]:
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def _said(facts: FileFacts) -> dict[str, Tensor]:
    """Return the tensors without values whose presence says how the network is read."""
    said = {VELOCITY: facts.prediction == "v", ZERO_SNR: facts.zero_snr}
    return {name: torch.zeros(0) for name, true in said.items() if true}


def read_facts(file: Path) -> FileFacts:
    """Return what a single file says by itself, from the names of its tensors."""
    with safe_open(file, "pt") as opened:
        return facts_of_names(set(opened.keys()))


def _header(model: TrainedModel, facts: FileFacts) -> dict[str, str]:
    """Return the metadata of the file: ModelSpec 1.0.1."""
    height, width = model.pipeline.image_shape[1:]
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": facts.architecture,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": model.run.name,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": facts.prediction,
        "modelspec.date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def how_to_run(name: str) -> str:
    """Return how an image is made from the file."""
    return (
        f"sfumato sample {name} --like FOLDER   # of the base, or of the same family\n"
        f"# ComfyUI: put {name} into models/checkpoints"
    )
