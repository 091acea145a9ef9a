"""The folder of a model, whatever it was named by."""

from __future__ import annotations

from pathlib import Path

from sfumato.errors import ConfigError
from sfumato.interop.hub import local_model
from sfumato.interop.single_file_reader import read_single_file
from sfumato.observability.progress import console
from sfumato.storage.weight_files import refuse_pickle


def model_folder(path: str | Path, *, variant: str = "", like: str | Path | None = None) -> Path:
    """Return the folder of a run or of a pipeline in diffusers' layout.

    A model on the Hugging Face hub is downloaded. A single file of Stable Diffusion's layout is
    converted to a folder in the cache; what was taken from where is printed.

    Args:
        path: a folder, "owner/name", or a .safetensors file.
        variant: which weights are downloaded, e.g. "fp16".
        like: for a file, a pipeline's folder of the same family.
    Raises:
        ConfigError: for a file without `like`, or a folder with it.
        CheckpointError: for a file that cannot be read, or a model that cannot be downloaded.
    """
    refuse_pickle(Path(path))
    if like is not None:
        return _converted(Path(path), Path(like))
    folder = local_model(path, variant=variant)
    if folder.is_file():
        raise ConfigError(
            "is a single file, which lacks its configuration",
            where=str(path),
            hint="name a pipeline's folder of the same family: --like FOLDER, or like=FOLDER",
        )
    return folder


def _converted(path: Path, like: Path) -> Path:
    """Return the folder of a single file, and print what was taken from where.

    Raises:
        ConfigError: if it is not a file.
    """
    if path.is_dir():
        raise ConfigError(
            "is a folder, and `like` is for single files",
            where=str(path),
            hint="leave --like out",
        )
    converted = read_single_file(path, like)
    for note in converted.notes:
        console().print(f"note: {note}", markup=False)
    return converted.folder
