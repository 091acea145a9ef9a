"""The control branch of a run as a folder of diffusers' ControlNetModel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from sfumato.adapters import Control, sharing_tensors
from sfumato.errors import ConfigError
from sfumato.generation.pipeline import Pipeline
from sfumato.interop.merging import NAMES, require_dtype, round_tensor
from sfumato.interop.opening import drawings, largest_difference, require_same
from sfumato.interop.trained_model import TrainedModel
from sfumato.networks.diffusers_control import UNetControl, read_branch
from sfumato.networks.diffusers_weights import WEIGHTS
from sfumato.training.parameters import count


def write_controlnet(trained: TrainedModel, path: Path, dtype: torch.dtype) -> list[str]:
    """Write the control branch to a new folder.

    It is read back and used with the base: one image is compared with one of the run.

    Raises:
        ConfigError: if the run has no control branch, or a tensor overflows in `dtype`.
        OutputError: if the folder gives other images than the run.
    """
    require_dtype(dtype)
    _, branch = _branch(trained.pipeline)
    tensors = {
        name: round_tensor(name, tensor.detach().cpu(), dtype)
        for name, tensor in branch.model.state_dict().items()
    }
    path.mkdir(parents=True, exist_ok=True)
    branch.model.save_config(path)
    save_file(tensors, path / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
    model = sharing_tensors(trained.pipeline.model)
    reopened = replace(trained.pipeline, model=model)
    control, _ = _branch(reopened)
    control.branch = read_branch(path, branch.factor).eval().requires_grad_(False)
    difference = largest_difference(trained.pipeline, reopened, **drawings(trained.pipeline))
    channels = branch.model.config.conditioning_channels
    return [
        f"control branch of {count(branch.parameters())} parameters, {NAMES[dtype]}, for images of "
        f"{channels} channels: {_read(trained.pipeline)}",
        require_same(difference, dtype, where=path),
    ]


def _branch(pipeline: Pipeline) -> tuple[Control, UNetControl]:
    modules = pipeline.model.network.modules()
    control = next((part for part in modules if isinstance(part, Control)), None)
    if control is None or not isinstance(control.branch, UNetControl):
        raise ConfigError(
            "has no control branch of diffusers",
            where="export",
            hint="train with adapter.kind=controlnet",
        )
    return control, control.branch


def _read(pipeline: Pipeline) -> str:
    """Say what the channels of an image are."""
    if pipeline.reads.count("doodle"):
        return "first ink, from 0 to 1; second 1; others 0"
    return "the maps of " + ", ".join(name for name in pipeline.reads if name != "text")
