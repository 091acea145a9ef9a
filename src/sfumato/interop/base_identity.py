"""The identity of the parts of a base that lie outside of its network."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sfumato.autoencoders import io as autoencoder_files
from sfumato.conditioners import CompositeConditioner
from sfumato.foreign_models import PIPELINE
from sfumato.interop.base_folder import base_of
from sfumato.interop.diffusers_folder import SCHEDULER, read_json
from sfumato.interop.pipeline_calls import pipeline_call
from sfumato.interop.schedulers import read_scheduler
from sfumato.recipes.autoencoder_stage import PretrainedAutoencoder
from sfumato.recipes.run import Run
from sfumato.storage.base_parts import SETTINGS


def base_parts(run: Run, conditioner: CompositeConditioner) -> dict[str, str]:
    """Return a hash of each part of a run's base but its network: text encoders, autoencoder and
    scheduler; {} for a run from scratch without a pretrained part.

    The network's frozen parameters have a hash of their own in every checkpoint.

    Args:
        conditioner: of the run's model.
    """
    parts, space = conditioner.base_parts(), run.autoencoder
    folder = base_of(run)
    if run.has_base and isinstance(space, PretrainedAutoencoder) and Path(space.path).exists():
        loaded = autoencoder_files.load(space.path, space.decoder, variant=space.variant)
        parts["vae"] = autoencoder_files.identity(loaded)
    if run.has_base and folder is not None and (folder / SCHEDULER).is_file():
        parts[SETTINGS] = _scheduler(folder)
    return parts


def _scheduler(folder: Path) -> str:
    """Return a hash of what a scheduler's configuration says, whatever defaults it writes out."""
    call = pipeline_call(str(read_json(folder / PIPELINE).get("_class_name")))
    read = read_scheduler(
        read_json(folder / SCHEDULER), where=str(folder / SCHEDULER), even_times=call.even_times
    )
    content = repr((read.schedule, read.denoiser, read.sampling))
    return hashlib.sha256(content.encode()).hexdigest()
