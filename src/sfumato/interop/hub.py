"""Models by their names on the Hugging Face hub (extra `diffusers`). The only module that imports
`huggingface_hub`.
"""

from __future__ import annotations

import re
from pathlib import Path

from sfumato.errors import CheckpointError, ConfigError

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
READ = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
# folders only, since models in one file lie beside them
WANTED = tuple(f"*/{pattern}" for pattern in READ)
VARIANTS = ("*.fp16*", "*.bf16*", "*.non_ema*", "*.ema*")
UNUSED = ("safety_checker/*", "feature_extractor/*", "image_encoder/*", "*.msgpack", "*onnx*")


def is_model_name(name: str | Path) -> bool:
    """Return whether this is an owner and a name, and not a path.

    What exists is a path, and so is what would lie in a folder that exists.
    """
    path = Path(name)
    return (
        NAME.fullmatch(path.as_posix()) is not None
        and not path.exists()
        and not path.parent.is_dir()
    )


def local_model(name: str | Path, *, variant: str = "") -> Path:
    """Return the folder of a model: the path itself, or a copy of what the hub has by this name.

    Files that were downloaded before are not downloaded again, and are used without a connection.

    Args:
        name: a path, or "owner/name".
        variant: of the weights, e.g. "fp16"; others are not downloaded.
    Raises:
        ConfigError: for a name on the hub, if huggingface_hub is not installed.
        CheckpointError: if the hub cannot be reached, or the model is not there or is gated.
    """
    if not is_model_name(name):
        return Path(name)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(
            "is neither a path, nor can it be looked up on the hub: huggingface_hub is not installed",
            where=str(name),
            hint="pip install 'sfumato[diffusers]', or name a folder",
        ) from None
    weights = f"*/*.{variant}*.safetensors" if variant else "*/*.safetensors"
    small = [pattern for pattern in WANTED if not pattern.endswith(".safetensors")]
    try:
        folder = snapshot_download(
            Path(name).as_posix(),
            allow_patterns=["model_index.json", *small, weights],
            ignore_patterns=[*UNUSED, *(VARIANTS if not variant else ())],
        )
    except Exception as error:  # the library raises whatever its HTTP client does
        raise CheckpointError(
            "is not a folder here, and cannot be loaded from the hub either: "
            f"{type(error).__name__}: {_first_sentence(error)}",
            where=str(name),
            hint="check the path, or the name on the hub and the connection; a gated model needs its "
            "license accepted and `hf auth login`",
        ) from None
    return Path(folder)


def _first_sentence(error: Exception) -> str:
    """Return the first sentence of a message, on one line."""
    return " ".join(str(error).split()).partition(". ")[0].rstrip(".")


def name_of(folder: Path) -> str:
    """Return the name of a model's folder; of a copy from the hub, the name that it has there."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":  # models--OWNER--NAME/snapshots/REVISION
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name
