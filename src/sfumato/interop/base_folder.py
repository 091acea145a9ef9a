"""The folder in diffusers' layout that a run was fine-tuned from, and what an export takes from it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato.conditioners import PipelineTextConfig
from sfumato.errors import CheckpointError
from sfumato.foreign_models import PIPELINE
from sfumato.interop.diffusers_folder import read_json
from sfumato.interop.ldm_names import TEXT
from sfumato.networks.diffusers_models import DiffusersConfig
from sfumato.recipes.run import Run

COPIED = (".json", ".txt", ".model", ".safetensors")  # and nothing that can run code
TEXT_PARTS = ("text_encoder", "tokenizer")  # and those with a number after it
TEXT_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class BaseFolder:
    """A pipeline's folder.

    Attributes:
        path: of the folder.
        index: the content of its model_index.json.
    """

    path: Path
    index: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> BaseFolder:
        """Read a pipeline's folder.

        Raises:
            CheckpointError: if it is not there.
        """
        if not (path / PIPELINE).is_file():
            raise CheckpointError(
                f"has no {PIPELINE}",
                where=str(path),
                hint="the run was fine-tuned from this folder, and the export needs its text "
                "encoders and autoencoder: put it back",
            )
        return cls(path, read_json(path / PIPELINE))

    def part_class(self, part: str) -> str:
        """Return the class of a part; "" where the pipeline has none."""
        entry = self.index.get(part)
        return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 and entry[1] else ""

    @property
    def text_parts(self) -> list[str]:
        """Names of the text encoders and tokenizers."""
        return [
            name for name in self.index if name.startswith(TEXT_PARTS) and self.part_class(name)
        ]

    def copy_part(
        self, part: str, target: Path, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Copy a part's files as they are; those of CLIP get names that every program knows.

        Args:
            weights: that take the place of the part's own; None for these.
        Raises:
            CheckpointError: if it is not there.
        """
        source = self.path / part
        if not source.is_dir():
            raise CheckpointError(
                "is missing", where=str(source), hint="download the whole pipeline"
            )
        copy_files(source, target)
        if weights is not None:
            for file in (*target.glob("*.safetensors"), *target.glob("*.safetensors.index.json")):
                file.unlink()
            save_file(dict(weights), target / TEXT_WEIGHTS, metadata={"format": "pt"})
        if self.part_class(part).startswith("CLIPText"):
            with_text_model_names(target / TEXT_WEIGHTS)


def copy_files(source: Path, target: Path, *, without: tuple[str, ...] = ()) -> None:
    """Copy the weights and descriptions of a folder to a new one, and nothing that can run code.

    Variants of the weights (model.fp16.safetensors) are left out where plain ones are beside them.
    """
    files = [
        file
        for file in sorted(source.iterdir())
        if file.is_file() and file.suffix in COPIED and file.name not in without
    ]
    plain = any(file.suffix == ".safetensors" and "." not in file.stem for file in files)
    target.mkdir(parents=True)
    for file in files:
        if not (plain and file.suffix == ".safetensors" and "." in file.stem):
            shutil.copyfile(file, target / file.name)


def base_of(run: Run) -> Path | None:
    """Return the pipeline's folder that a run began with; None for a run from scratch.

    It is that of its network, or else that of its text encoders.
    """
    network, text = run.network, run.conditioner.text
    if isinstance(network, DiffusersConfig) and network.path:
        return Path(network.path).parent
    return Path(text.path) if isinstance(text, PipelineTextConfig) else None


def with_text_model_names(file: Path) -> None:
    """Rename the tensors of a CLIP text encoder so that they begin with `text_model.`.

    transformers 5 writes CLIPTextModel without that prefix, and other programs look for it.
    """
    if not file.is_file():
        return
    with safe_open(file, "pt") as opened:
        names = list(opened.keys())
    if any(name.startswith(TEXT) for name in names):
        return
    tensors = {
        name if name.startswith("text_projection") else TEXT + name: tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})


def license_of(base: Path) -> str:
    """Return the license that a model folder's README.md names; "" if it names none."""
    try:
        text = (base / "README.md").read_text(encoding="utf-8")[:20_000]
    except (OSError, ValueError):
        return ""
    lines = text.split("---")[1].splitlines() if text.startswith("---") else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("license:"))
    return next(named, "")


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
