"""Folders in diffusers' layout, read as runs of ours."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sfumato.autoencoders import Autoencoder, Pixels, io
from sfumato.conditioners import (
    ClassLabelsConfig,
    ConditioningInfo,
    PipelineTextConfig,
    ResizingConfig,
)
from sfumato.conditioners.pipeline_encoder import PARTS
from sfumato.conditioners.pipeline_prompts import PIPELINES
from sfumato.contexts import ContextConfig
from sfumato.data import DataConfig
from sfumato.diffusion import Objective
from sfumato.errors import CheckpointError, ConfigError
from sfumato.foreign_models import CONFIG, PIPELINE, code_remark, refuse_code
from sfumato.interop.hub import name_of
from sfumato.interop.pipeline_calls import pipeline_call
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
CLASS_CONDITIONAL = "DiTTransformer2DModel"
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
            return io.load(config.path, variant=config.variant)
        return Pixels(self.run.data.channels)


def read_folder(folder: Path, *, variant: str = "") -> ReadFolder:
    """Read the configuration of a pipeline's folder (model_index.json); no weights are read.

    Args:
        variant: of the weights, e.g. "fp16"; without it, a variant is taken where it is the only
            one.
    Raises:
        CheckpointError: for a folder that is not whole.
        ConfigError: for a class or a setting that is not supported.
    """
    index = read_json(folder / PIPELINE)
    refuse_code(index, OPTIONAL, where=str(folder / PIPELINE))
    part = next((name for name in NETWORKS if _class(index, name)), None)
    if part is None:
        raise CheckpointError(
            f"names neither {' nor '.join(NETWORKS)}",
            where=str(folder / PIPELINE),
            hint="only pipelines with one of them can be read",
        )
    architecture, pipeline = _class(index, part), str(index.get("_class_name"))
    family, call = require_family(architecture), pipeline_call(pipeline)
    _require_read(index, part, folder)
    settings = read_json(folder / part / CONFIG)
    family.require_supported({"_class_name": architecture, **settings})
    scheduler = read_scheduler(
        read_json(folder / SCHEDULER),
        where=str(folder / SCHEDULER),
        even_times=call.even_times,
        unsupported=call.unsupported,
    )
    channels = family.channels(settings)
    autoencoder, factor, image_channels = _autoencoder(index, folder, channels, variant)
    side, usual = _side(settings, family.usual_side)
    names = class_names(index, settings) if architecture == CLASS_CONDITIONAL else ()
    network = DiffusersConfig(
        architecture=architecture,
        settings={key: value for key, value in settings.items() if not key.startswith("_")},
        path=str(folder / part),
        image_factor=factor,
        variant=variant,
    )
    run = Run(
        name=name_of(folder),
        data=DataConfig(resolution=side * factor, channels=image_channels),
        network=network,
        autoencoder=autoencoder,
        conditioner=ContextConfig(
            text=PipelineTextConfig(path=str(folder), variant=variant)
            if _is_textual(index)
            else None,
            category=ClassLabelsConfig(names=names) if names else None,
            resizing=ResizingConfig() if family.reads_resizing(settings) else None,
        ),
        denoiser=scheduler.denoiser,
        objective=Objective(schedule=scheduler.schedule.at_size(side, side)),
        sampling=replace(
            scheduler.sampling, guidance=call.guidance, guidance_rescale=call.guidance_rescale
        ),
    )
    skipped = [name for name in OPTIONAL if _class(index, name)]
    size = f"the model names no size: images have {side * factor} x {side * factor} pixels"
    told = f"the network is told a guidance of {network.embedded_guidance:g} (network."
    remarks = [
        *scheduler.remarks,
        *(f"{name} is not used" for name in skipped),
        *([f"{size} unless another one is given"] if usual else []),
        *([f"{told}embedded_guidance)"] if settings.get("guidance_embeds") else []),
        *([call.remark] if call.remark else []),
    ]
    return ReadFolder(
        run=run,
        info=ConditioningInfo(channels=image_channels, factor=factor, categories=names),
        remarks=(*remarks, *code_remark(folder)),
    )


def _require_read(index: Mapping[str, Any], part: str, folder: Path) -> None:
    """Raise ConfigError if a pipeline has a part that is neither read nor optional."""
    texts = [name for name in index if _is_textual(index) and name.startswith(PARTS)]
    known = (part, "scheduler", "vae", *texts, *OPTIONAL)
    unread = [
        name
        for name in index
        if not name.startswith("_") and _class(index, name) and name not in known
    ]
    if unread:
        raise ConfigError(
            f"{index.get('_class_name')} has parts that cannot be read yet: {', '.join(unread)}",
            where=str(folder / PIPELINE),
            hint=f"supported are {', '.join(PIPELINES)}, and pipelines without text",
        )


def _is_textual(index: Mapping[str, Any]) -> bool:
    return index.get("_class_name") in PIPELINES and bool(_class(index, "text_encoder"))


def _autoencoder(
    index: Mapping[str, Any], folder: Path, channels: int, variant: str
) -> tuple[AutoencoderConfig, int, int]:
    """Return the autoencoder, the side of an image over that of its latents, and its channels.

    Raises:
        ConfigError: if the network does not read its latents.
    """
    if not _class(index, "vae"):
        return PixelsConfig(), 1, channels
    autoencoder = PretrainedAutoencoder(path=str(folder / "vae"), statistics="own", variant=variant)
    shape = autoencoder.latent_shape(3, None)
    if shape.channels != channels:
        raise ConfigError(
            f"the network reads {channels} channels, and the latents have {shape.channels}",
            where=str(folder),
            hint="networks for inpainting and editing are not supported",
        )
    return autoencoder, shape.factor, 3


def class_names(index: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a name for each class that a network knows, in the order of their numbers.

    A class has the first of its labels (`id2label` in model_index.json) that no other class has
    as its first one, else all of them; without labels, its number.
    """
    count = int(settings.get("num_embeds_ada_norm") or 1000)
    labels = index.get("id2label") or {}
    full = [str(labels.get(str(number), number)) for number in range(count)]
    short = [label.partition(",")[0].strip() for label in full]
    seen = Counter(short)
    return tuple(
        first if seen[first] == 1 else label for first, label in zip(short, full, strict=True)
    )


def _class(index: Mapping[str, Any], name: str) -> str:
    """Return the class of a pipeline's part, "" where it has none."""
    entry = index.get(name)
    return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 and entry[1] else ""


def _side(settings: Mapping[str, Any], usual: int) -> tuple[int, bool]:
    """Return the side of the network's input, and whether it is only the usual one."""
    size = settings.get("sample_size")
    if isinstance(size, int):
        return size, False
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        return int(size[0]), False
    if size is None and usual:
        return usual, True
    raise ConfigError(
        f"sample_size = {size!r}",
        where="network",
        hint="set it in config.json to the side of the network's input",
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: if it cannot be read, or holds something else.
    """
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
