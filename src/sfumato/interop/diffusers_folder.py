"""Folders in diffusers' layout, read as runs of ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sfumato.autoencoders import Autoencoder, Pixels, io
from sfumato.conditioners import ConditioningInfo, PipelineTextConfig
from sfumato.conditioners.pipeline_text import PARTS, PIPELINES
from sfumato.contexts import ContextConfig
from sfumato.data import DataConfig
from sfumato.diffusion import Objective
from sfumato.errors import CheckpointError, ConfigError
from sfumato.foreign_models import CONFIG, PIPELINE
from sfumato.interop.schedulers import read_scheduler
from sfumato.networks.diffusers_models import DiffusersConfig, require_family
from sfumato.recipes.autoencoder_stage import (
    AutoencoderConfig,
    PixelsConfig,
    PretrainedAutoencoder,
)
from sfumato.recipes.run import Run

NETWORKS = ("unet", "transformer")
SCHEDULER = "scheduler/scheduler_config.json"
# of a pipeline, and not needed to sample
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")


@dataclass(frozen=True, kw_only=True)
class ReadFolder:
    """A model of diffusers as a run of ours.

    Attributes:
        run: its configuration; `data` says size and channels only.
        info: what its conditioner is built from.
        remarks: lines that say what was replaced or left out.
    """

    run: Run
    info: ConditioningInfo
    remarks: tuple[str, ...]

    def load_autoencoder(self) -> Autoencoder:
        """Load the folder's autoencoder, whose latents are scaled as it says itself."""
        config = self.run.autoencoder
        if isinstance(config, PretrainedAutoencoder):
            return io.load(config.path)
        return Pixels(self.run.data.channels)


def read_folder(folder: Path, *, variant: str = "") -> ReadFolder:
    """Read the configuration of a pipeline's folder (model_index.json); no weights are read.

    Raises:
        CheckpointError: for a folder that is not whole.
        ConfigError: for a class or a setting that is not supported.
    """
    index = _json(folder / PIPELINE)
    part = next((name for name in NETWORKS if _class(index, name)), None)
    if part is None:
        raise CheckpointError(
            f"names neither {' nor '.join(NETWORKS)}",
            where=str(folder / PIPELINE),
            hint="only pipelines with one of them can be read",
        )
    architecture = _class(index, part)
    require_family(architecture)
    textual = index.get("_class_name") in PIPELINES and bool(_class(index, "text_encoder"))
    guidance = PIPELINES[index["_class_name"]].guidance if textual else 1.0
    texts = [name for name in index if textual and name.startswith(PARTS)]
    reads = (part, "scheduler", "vae", *texts)
    unread = [
        name
        for name in index
        if not name.startswith("_") and _class(index, name) and name not in (*reads, *OPTIONAL)
    ]
    if unread:
        raise ConfigError(
            f"{index.get('_class_name')} has parts that cannot be read yet: {', '.join(unread)}",
            where=str(folder / PIPELINE),
            hint=f"supported are {', '.join(PIPELINES)}, and pipelines without text",
        )
    settings = _json(folder / part / CONFIG)
    scheduler = read_scheduler(_json(folder / SCHEDULER), where=str(folder / SCHEDULER))
    side, channels = _side(settings), int(settings.get("in_channels", 3))
    autoencoder: AutoencoderConfig = PixelsConfig()
    factor = 1
    if _class(index, "vae"):
        autoencoder = PretrainedAutoencoder(path=str(folder / "vae"), statistics="own")
        shape = autoencoder.latent_shape(3, None)
        if shape.channels != channels:
            raise ConfigError(
                f"the network reads {channels} channels, and the latents have {shape.channels}",
                where=str(folder),
                hint="networks for inpainting and editing are not supported",
            )
        factor, channels = shape.factor, 3
    side *= factor
    run = Run(
        name=folder.resolve().name,
        data=DataConfig(resolution=side, channels=channels),
        network=DiffusersConfig(
            architecture=architecture,
            settings={key: value for key, value in settings.items() if not key.startswith("_")},
            path=str(folder / part),
            image_factor=factor,
            variant=variant,
        ),
        autoencoder=autoencoder,
        conditioner=ContextConfig(text=PipelineTextConfig(path=str(folder)) if textual else None),
        denoiser=scheduler.denoiser,
        objective=Objective(schedule=scheduler.schedule),
        sampling=replace(scheduler.sampling, guidance=guidance),
    )
    skipped = [name for name in OPTIONAL if _class(index, name)]
    remarks = scheduler.remarks + tuple(f"{name} is not used" for name in skipped)
    return ReadFolder(
        run=run,
        info=ConditioningInfo(channels=channels, factor=factor),
        remarks=remarks,
    )


def _class(index: Mapping[str, Any], name: str) -> str:
    """Return the class of a pipeline's part, "" where it has none."""
    entry = index.get(name)
    return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 and entry[1] else ""


def _side(settings: Mapping[str, Any]) -> int:
    size = settings.get("sample_size")
    if isinstance(size, int):
        return size
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        return int(size[0])
    raise ConfigError(
        f"sample_size = {size!r}",
        where="network",
        hint="name the size with --size, e.g. --size 64x64",
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"cannot be read: {error.strerror}", where=str(path), hint="download the whole folder"
        ) from None
    except ValueError as error:
        raise CheckpointError(
            f"is not valid JSON: {error}", where=str(path), hint="download it again"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError("is not a JSON object", where=str(path), hint="download it again")
    return value
