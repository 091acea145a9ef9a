"""A run of a network of diffusers as a pipeline's folder, which diffusers loads by itself."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfumato.autoencoders.io import STATISTICS
from sfumato.conditioners import PipelineTextConfig
from sfumato.config import kind_of
from sfumato.diffusers_library import import_diffusers
from sfumato.errors import ConfigError
from sfumato.foreign_models import CONFIG, PIPELINE
from sfumato.interop.base_folder import BaseFolder, base_of, copy_files
from sfumato.interop.diffusers_folder import NETWORKS, SCHEDULER, read_json
from sfumato.interop.merging import Merged, merge
from sfumato.interop.model_card import write_card
from sfumato.interop.opening import clip_skip_of, largest_difference, reopen, require_same
from sfumato.interop.scheduler_writer import dividing_steps, first_difference, write_scheduler
from sfumato.interop.schedulers import read_scheduler
from sfumato.interop.trained_model import TrainedModel
from sfumato.networks.diffusers_backbone import DiffusersBackbone
from sfumato.networks.diffusers_models import DiffusersConfig
from sfumato.networks.diffusers_weights import WEIGHTS as NETWORK_WEIGHTS
from sfumato.recipes.autoencoder_stage import FINAL, FOLDER, PixelsConfig, PretrainedAutoencoder
from sfumato.recipes.run import Run
from sfumato.sampling import Even
from sfumato.storage.atomic import atomic_folder
from sfumato.storage.output_paths import require_free
from sfumato.storage.run_directory import BUNDLE

# pipelines of networks that read nothing, by their scheduler's class
UNCONDITIONAL = {"DDIMScheduler": "DDIMPipeline"}
OTHER_UNCONDITIONAL = "DDPMPipeline"


@dataclass(frozen=True, kw_only=True)
class FolderPlan:
    """What a pipeline's folder will be made of, all of which is possible.

    Attributes:
        network: of diffusers, perhaps with adapted layers.
        texts: the text encoders that were trained, by name.
        base: the folder that the run began with; None for one from scratch.
        index: the content of model_index.json.
        scheduler: the content of scheduler_config.json.
        autoencoder: the folder that is copied; None for a model of pixels.
        lines: what is chosen or changed, to print.
    """

    network: DiffusersBackbone
    texts: Mapping[str, nn.Module]
    base: BaseFolder | None
    index: dict[str, Any]
    scheduler: dict[str, Any]
    autoencoder: Path | None
    lines: tuple[str, ...]

    @property
    def part(self) -> str:
        """The name of the network's sub-folder."""
        return next(name for name in NETWORKS if name in self.index)


def write_diffusers(model: TrainedModel, out: Path, dtype: torch.dtype) -> list[str]:
    """Write a pipeline's folder with the network's changes merged into its weights.

    The rest of the pipeline is that of the base, unchanged. The folder is opened again, and an
    image of it is compared with one of the run.

    Args:
        out: the new folder.
        dtype: of the network's weights.
    Returns:
        Lines that say what was written, what was compared, and what was lost.
    Raises:
        ConfigError: naming what of the run a pipeline of diffusers does not have, or a tensor that
            overflows.
        CheckpointError: if the base is gone.
        OutputError: if `out` exists already, or the folder gives other images than the run.
    """
    require_free(out)
    plan = plan_folder(model)
    merged = merge(model.run, plan.network, dtype, plan.texts)
    with atomic_folder(out) as folder:
        write_folder(model, plan, merged, folder)
        difference = largest_difference(model.pipeline, reopen(folder, model.run))
        same = require_same(difference, dtype, where=out)
        write_card(model, folder, how_to_run(model, plan))
    return [*plan.lines, *merged.lines, same]


def plan_folder(model: TrainedModel) -> FolderPlan:
    """Return what the folder of a run will be made of; nothing is written.

    Raises:
        ConfigError: naming what of the run a pipeline of diffusers does not have.
        CheckpointError: if the base is gone.
    """
    run, network = model.run, model.pipeline.model.network
    if not isinstance(network, DiffusersBackbone) or not isinstance(run.network, DiffusersConfig):
        raise ConfigError(
            f"diffusers has no class for the network {kind_of(type(run.network))}: its layers and "
            "their order are sfumato's own",
            where="export",
            hint="use the format `bundle` (or `onnx`), or train with network.kind=diffusers "
            "network.architecture=UNet2DModel, whose folders diffusers loads",
        )
    text = run.conditioner.text
    others = sorted(set(model.pipeline.model.conditioner.user_inputs) - {"text"})
    if others or not (text is None or isinstance(text, PipelineTextConfig)):
        named = ", ".join(others) or f"text of kind {kind_of(type(text))}"
        raise ConfigError(
            f"pipelines of diffusers are not steered by {named}",
            where="export",
            hint="use the format `bundle`",
        )
    where = base_of(run)
    if where is not None and (model.directory / BUNDLE).is_file():
        raise ConfigError(
            "is a bundle, which holds the text encoders of its base and no other part of it",
            where=str(model.directory),
            hint="export the run that the bundle was written from",
        )
    base = None if where is None else BaseFolder.read(where)
    if base is not None and run.network.architecture not in map(base.part_class, NETWORKS):
        raise ConfigError(
            f"the pipeline {base.path.name} has no part of class {run.network.architecture}",
            where="export",
            hint="use the format `bundle`",
        )
    scheduler, scheduler_lines = _scheduler(model, base)
    autoencoder, autoencoder_lines = _autoencoder(model, base)
    index = _index(run.network.architecture, base, scheduler, autoencoder)
    sampling = run.sampling
    call = call_arguments(run)
    lines = [*scheduler_lines, *autoencoder_lines]
    lines.append(f"arguments of the pipeline's call, as in the run: {', '.join(call)}")
    if sampling.interval != (-float("inf"), float("inf")):
        lines.append("the guidance interval is not part of a folder: guidance acts at all levels")
    return FolderPlan(
        network=network,
        texts=model.pipeline.model.conditioner.trained_text_encoders(),
        base=base,
        index=index,
        scheduler=scheduler,
        autoencoder=autoencoder,
        lines=tuple(lines),
    )


def _scheduler(model: TrainedModel, base: BaseFolder | None) -> tuple[dict[str, Any], list[str]]:
    """Return the scheduler's configuration: that of the base, unless the run samples otherwise."""
    run = model.run
    if base is not None:
        own: dict[str, Any] = read_json(base.path / SCHEDULER)
        changed = first_difference(own, run.denoiser, run.sampling)
        if not changed:
            remarks = read_scheduler(own, where=str(base.path / SCHEDULER)).remarks
            kept = f"scheduler: {own['_class_name']}, as in the base"
            return own, [kept, *(f"in the run, {remark}" for remark in remarks)]
        written = write_scheduler(run.denoiser, run.sampling)
        return written, [
            f"scheduler: {written['_class_name']} in the place of {own['_class_name']}, since the "
            f"run has another {changed}"
        ]
    written = write_scheduler(run.denoiser, run.sampling)
    lines = [f"scheduler: {written['_class_name']}, written from the run"]
    size, steps = written["num_train_timesteps"], run.sampling.steps
    same = dividing_steps(steps, size)
    if isinstance(run.sampling.spacing, Even) and same != steps and "timestep_spacing" in written:
        lines.append(
            f"diffusers rounds levels where the steps do not divide {size}: at {steps} steps its "
            f"images differ a little from the run's, at {same} they do not"
        )
    if written["_class_name"] == "DDIMScheduler" and run.sampling.clip:
        lines.append("clipping as in the run: call the pipeline with use_clipped_model_output=True")
    return written, lines


def _autoencoder(model: TrainedModel, base: BaseFolder | None) -> tuple[Path | None, list[str]]:
    """Return the folder of the autoencoder that the run's latents belong to."""
    config = model.run.autoencoder
    if isinstance(config, PixelsConfig):
        return None, []
    if (
        isinstance(config, PretrainedAutoencoder)
        and base is not None
        and config.statistics == "own"
        and Path(config.path).resolve() == (base.path / "vae").resolve()
    ):
        return base.path / "vae", ["vae: that of the base"]
    own = model.directory / FOLDER / FINAL
    settings = read_json(own / CONFIG)
    if base is None or settings.get("_class_name") != "AutoencoderKL":
        raise ConfigError(
            "no pipeline of diffusers has this network with the autoencoder "
            f"{settings.get('_class_name')} of the run",
            where="export",
            hint="use the format `bundle`",
        )
    return own, ["vae: the run's own autoencoder, whose latents the network was trained on"]


def _index(
    architecture: str, base: BaseFolder | None, scheduler: dict[str, Any], autoencoder: Path | None
) -> dict[str, Any]:
    """Return the content of model_index.json."""
    version = import_diffusers("the format `diffusers`", where="export").__version__
    kind = str(scheduler["_class_name"])
    if base is None:
        return {
            "_class_name": UNCONDITIONAL.get(kind, OTHER_UNCONDITIONAL),
            "_diffusers_version": version,
            "scheduler": ["diffusers", kind],
            "unet": ["diffusers", architecture],
        }
    kept = (*NETWORKS, "vae", *base.text_parts)
    index: dict[str, Any] = {
        name: value if not isinstance(value, list) or name in kept else [None, None]
        for name, value in base.index.items()
        if name not in ("_name_or_path", "_diffusers_version", "scheduler")
    }
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    if autoencoder is not None:
        index["vae"] = ["diffusers", read_json(autoencoder / CONFIG).get("_class_name")]
    return {**index, "_diffusers_version": version, "scheduler": ["diffusers", kind]}


def write_folder(model: TrainedModel, plan: FolderPlan, merged: Merged, folder: Path) -> None:
    """Write the planned folder, which exists and is empty."""
    _write_json(folder / PIPELINE, plan.index)
    _write_json(folder / SCHEDULER, plan.scheduler)
    target = folder / plan.part
    plan.network.model.save_config(target)
    _set_size(model, target / CONFIG)
    # shards of 10 GB and their index, as diffusers reads them
    importlib.import_module("huggingface_hub").save_torch_state_dict(
        merged.tensors,
        target,
        filename_pattern=f"{NETWORK_WEIGHTS}{{suffix}}.safetensors",
        max_shard_size="10GB",
    )
    if plan.autoencoder is not None:
        copy_files(plan.autoencoder, folder / "vae", without=(STATISTICS,))
    if plan.base is not None:
        for part in plan.base.text_parts:
            plan.base.copy_part(part, folder / part, merged.texts.get(part))


def _set_size(model: TrainedModel, config: Path) -> None:
    """Write the size of the run's images into the configuration of a U-Net.

    Transformers are left as they are: their positions depend on it.
    """
    settings = read_json(config)
    settings.pop("_name_or_path", None)
    if settings["_class_name"].startswith("UNet"):
        factor = model.pipeline.autoencoder.factor
        height, width = (side // factor for side in model.pipeline.image_shape[1:])
        settings["sample_size"] = height if height == width else [height, width]
    _write_json(config, settings)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def call_arguments(run: Run) -> list[str]:
    """Return the arguments of a pipeline's call with which it does what the run does."""
    arguments = [f"num_inference_steps={run.sampling.steps}"]
    if run.conditioner.text is not None:
        arguments.append(f"guidance_scale={run.sampling.guidance:g}")
    if count := clip_skip_of(run):
        arguments.append(f"clip_skip={count}")
    return arguments


def how_to_run(model: TrainedModel, plan: FolderPlan) -> str:
    """Return the lines of Python that make an image from the folder."""
    name, arguments = plan.index["_class_name"], call_arguments(model.run)
    if model.run.conditioner.text is not None:
        arguments = ['"a photo"', *arguments]
    return (
        f"from diffusers import {name}\n"
        f'pipeline = {name}.from_pretrained("FOLDER")\n'
        f'pipeline({", ".join(arguments)}).images[0].save("image.png")'
    )
