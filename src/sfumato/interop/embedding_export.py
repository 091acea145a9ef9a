"""The vectors that a textual inversion has learned, as diffusers' `load_textual_inversion` reads
them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sfumato.adapters import LearnedTokens, WholeNetwork
from sfumato.errors import ConfigError
from sfumato.generation.pipeline import Pipeline
from sfumato.interop.embedding import PARTS, TOKEN, with_embedding
from sfumato.interop.merging import NAMES, require_dtype, round_tensor
from sfumato.interop.opening import largest_difference, require_same
from sfumato.interop.trained_model import TrainedModel
from sfumato.recipes.model import build_model


def write_embedding(trained: TrainedModel, path: Path, dtype: torch.dtype) -> list[str]:
    """Write the learned vectors to a safetensors file.

    The file is read back and used with the base: one image of a prompt with the token is compared
    with one of the run.

    Raises:
        ConfigError: if no token was learned, or a vector overflows in `dtype`.
        OutputError: if the file gives other images than the run.
    """
    require_dtype(dtype)
    learned = _learned(trained)
    token, vectors = learned.names[0], learned.vectors()
    written = {
        name: round_tensor(name, rows.detach().cpu(), dtype)
        for name, rows in _named(token, vectors).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"format": "pt", TOKEN: token, "sfumato.step": str(trained.step)}
    save_file(written, path, metadata=header)
    reopened = with_embedding(_base(trained), path)
    prompt = f"a photo of {token}"
    difference = largest_difference(trained.pipeline, reopened, prompt=prompt)
    widths = ", ".join(f"{name} {tuple(rows.shape)}" for name, rows in written.items())
    return [
        f"vectors for {token}, {NAMES[dtype]}: {widths}",
        require_same(difference, dtype, where=path),
    ]


def _learned(trained: TrainedModel) -> LearnedTokens:
    modules = trained.pipeline.model.conditioner.modules()
    learned = next((part for part in modules if isinstance(part, LearnedTokens)), None)
    if learned is None:
        raise ConfigError(
            "has learned no token",
            where=str(trained.directory),
            hint="train with adapter.kind=textual-inversion",
        )
    return learned


def _named(token: str, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the vectors under the names that they have in files."""
    if vectors.keys() != set(PARTS.values()):
        return {token: next(iter(vectors.values()))}
    return {name: vectors[part] for name, part in PARTS.items()}


def _base(trained: TrainedModel) -> Pipeline:
    """Return the pipeline of the run's base, whose text encoders know no new token."""
    run, pipeline = replace(trained.run, adapter=WholeNetwork()), trained.pipeline
    model = build_model(run, pipeline.info, trained.directory)
    own = pipeline.model.state_dict()
    model.load_state_dict({name: own[name] for name in model.state_dict()})
    return replace(pipeline, model=model.eval().requires_grad_(False))
