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


def refuse_diffusers(folder: Path) -> None:
    """Raise RunError, naming its class, if a folder holds a model of diffusers."""
    name = diffusers_class(folder)
    if name is not None:
        raise RunError(
            f"holds a diffusers model ({name}), which sfumato cannot train or sample yet",
            where=str(folder),
            hint="use diffusers for it until a later version of sfumato loads such folders; "
            "its autoencoder can be used today: autoencoder.kind=pretrained "
            "autoencoder.path=FOLDER/vae",
        )
