"""Model folders of other programs, recognized by their files, so that an error can say what they
are.
"""

from __future__ import annotations

import json
from pathlib import Path

from sfumato.errors import RunError

# of diffusers: a pipeline's, and a single model's or scheduler's
PIPELINE, CONFIG = "model_index.json", "config.json"


def diffusers_class(folder: Path) -> str | None:
    """Return the class that diffusers loads a folder with, e.g. "DDPMPipeline".

    None for a folder that is not in diffusers' layout.
    """
    for name in (PIPELINE, CONFIG):
        try:
            index = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(index, dict) and isinstance(index.get("_class_name"), str):
            result: str | None = index["_class_name"]
            return result
    return None


def is_pipeline_folder(folder: Path) -> bool:
    """Return whether a folder holds a whole pipeline of diffusers (model_index.json)."""
    return (folder / PIPELINE).is_file()


def refuse_diffusers(folder: Path) -> None:
    """Raise RunError, naming its class, if a folder holds a model of diffusers."""
    name = diffusers_class(folder)
    if name is not None:
        raise RunError(
            f"holds a diffusers model ({name}), which sfumato cannot train yet",
            where=str(folder),
            hint="sample it with `sfumato sample FOLDER`, if it is a pipeline of a network and a "
            "scheduler; its autoencoder can be used with autoencoder.kind=pretrained "
            "autoencoder.path=FOLDER/vae",
        )
