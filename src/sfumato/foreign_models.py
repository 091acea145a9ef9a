"""Model folders of other programs, recognized by their files, so that an error can say what they
are.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sfumato.errors import ConfigError, RunError

# of diffusers: a pipeline's, and a single model's or scheduler's
PIPELINE, CONFIG = "model_index.json", "config.json"
LIBRARIES = ("diffusers", "transformers")


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


def refuse_code(index: Mapping[str, Any], optional: Collection[str], *, where: str) -> None:
    """Raise ConfigError if a pipeline consists of code of its own, which is never run.

    Args:
        index: the content of model_index.json.
        optional: parts that are not used, whatever they are.
    """
    named = {name: entry for name, entry in index.items() if name not in optional}
    for name, entry in named.items():
        malformed = name == "_class_name" and not isinstance(entry, str)
        library = entry[0] if isinstance(entry, list) and len(entry) == 2 else None
        foreign = not name.startswith("_") and library not in (None, *LIBRARIES)
        if malformed or foreign:
            raise ConfigError(
                f"{name} = {json.dumps(entry)} is code of the model's own, which is never run",
                where=where,
                hint=f"classes of {' and '.join(LIBRARIES)} are supported",
            )


def code_remark(folder: Path) -> tuple[str, ...]:
    """Return a remark on Python files in a model's folder; () if there are none."""
    code = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.py"))
    return (f"code in the folder is not run: {', '.join(code[:3])}",) if code else ()


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
