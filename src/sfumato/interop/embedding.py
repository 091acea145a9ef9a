"""Embeddings (textual inversion): the vectors of a new word for the text encoders of a pipeline.

A file has one tensor (n, d) under the name of the token, for Stable Diffusion 1 and 2; or two,
`clip_l` and `clip_g`, for the encoders of Stable Diffusion XL, and no name.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from sfumato.adapters import TokenLearner, sharing_tensors
from sfumato.errors import CheckpointError, ConfigError
from sfumato.generation.pipeline import Pipeline
from sfumato.interop.safetensors_files import read_safetensors

TOKEN = "sfumato.token"  # in the header, where the tensors' names do not say it
PARTS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
NAMELESS = ("emb_params", "*")  # the tensor in files of the web interfaces


def with_embedding(pipeline: Pipeline, path: str | Path, token: str = "") -> Pipeline:
    """Return a pipeline whose prompts may use the token of an embedding.

    The pipeline that is given stays as it is, and shares its weights with the new one.

    Args:
        path: a .safetensors file.
        token: in prompts; by default the one that the file names, else the name of the file.
    Raises:
        CheckpointError: if the file is not an embedding.
        ConfigError: if it does not fit the text encoders.
    """
    vectors, named = read_embedding(Path(path))
    model = sharing_tensors(pipeline.model)
    learners = [part for part in model.conditioner.modules() if isinstance(part, TokenLearner)]
    if not learners:
        raise ConfigError(
            "the model has no text encoder that reads embeddings",
            where=str(path),
            hint="use it with the model that it was trained on",
        )
    count, first = len(next(iter(vectors.values()))), token or named
    names = (first, *(f"{first}_{number}" for number in range(1, count)))
    for part in learners:
        part.learn_tokens(names, vectors)
    model.requires_grad_(False)
    return replace(pipeline, model=model)


def read_embedding(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read the vectors (n, D) by the name of the encoder, and the token.

    Raises:
        CheckpointError: if the file is not an embedding.
    """
    tensors, header = read_safetensors(path)
    vectors = {name: tensor.reshape(-1, tensor.shape[-1]) for name, tensor in tensors.items()
               if tensor.ndim in (1, 2) and tensor.is_floating_point()}  # fmt: skip
    token = header.get(TOKEN) or path.stem
    if len(vectors) == len(tensors) and vectors.keys() == PARTS.keys():
        return {part: vectors[name].float() for name, part in PARTS.items()}, token
    if len(vectors) != len(tensors) or len(tensors) != 1:
        raise CheckpointError(
            f"is not an embedding: it has {len(tensors)} tensors, e.g. {min(tensors, default='')}",
            where=str(path),
            hint="an embedding has one tensor (n, d), or two, clip_l and clip_g",
        )
    ((name, rows),) = vectors.items()
    return {"text_encoder": rows.float()}, token if name in NAMELESS else name
