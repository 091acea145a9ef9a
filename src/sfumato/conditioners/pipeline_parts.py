"""The encoders of a text-to-image pipeline, loaded one by one, so that what a file lacks is seen.

A table names every class that can be used. Classes are looked up in it, so that a file never
chooses what is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from sfumato.diffusers_library import quiet
from sfumato.errors import CheckpointError, ConfigError, closest
from sfumato.storage.weight_files import unreadable
from sfumato.transformers_models import from_transformers

ENCODERS = (
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "Gemma2Model",
    "Gemma2ForCausalLM",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3Model",
    "Qwen3ForCausalLM",
    "T5EncoderModel",
)
TOKENIZERS = tuple(
    f"{family}Tokenizer{speed}"
    for family in ("CLIP", "Gemma", "Qwen2", "T5")
    for speed in ("", "Fast")
)


def require_known(index: Mapping[str, Any], names: Sequence[str], place: str) -> None:
    """Raise ConfigError unless the classes of encoders and tokenizers are in the tables.

    Args:
        index: the content of model_index.json.
        names: of the parts that are needed.
    """
    for name in names:
        library, kind = index[name]
        known = TOKENIZERS if name.startswith("tokenizer") else ENCODERS
        if library != "transformers" or kind not in known:
            raise ConfigError(
                f"{name} is of the unsupported class {library}.{kind}",
                where=place,
                hint=f"{closest(str(kind), known)}supported are {', '.join(known)} of "
                "transformers; a model's own code is never run",
            )


def load_encoders(
    index: Mapping[str, Any], names: Sequence[str], place: str, **settings: Any
) -> dict[str, Any]:
    """Load the encoders among the parts of a pipeline, in float32.

    Args:
        settings: arguments of `from_pretrained`, such as the variant.
    Raises:
        CheckpointError: naming the tensor that is missing, does not fit or is not finite.
    """
    return {
        name: _load(str(index[name][1]), Path(place, name), **settings)
        for name in names
        if not name.startswith("tokenizer")
    }


@contextmanager
def with_encoders(pipeline: Any, encoders: Mapping[str, nn.Module]) -> Iterator[None]:
    """Use other encoders of a pipeline within the block, by name."""
    before = {name: getattr(pipeline, name) for name in encoders}
    try:
        for name, encoder in encoders.items():
            setattr(pipeline, name, encoder)
        yield
    finally:
        for name, encoder in before.items():
            setattr(pipeline, name, encoder)


def _load(kind: str, folder: Path, **settings: Any) -> Any:
    _require_readable(folder)
    with quiet():
        encoder, report = from_transformers(
            kind,
            str(folder),
            where=folder.name,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **settings,
        )
    for problem, names in (
        ("is missing in the weights", report["missing_keys"]),
        ("has another shape than config.json says", [key[0] for key in report["mismatched_keys"]]),
        ("has values that are not finite", _not_finite(encoder)),
    ):
        if names:
            raise CheckpointError(
                f"{min(names)} {problem}" + (f" ({len(names)} do)" if len(names) > 1 else ""),
                where=str(folder),
                hint="download it again; the weights may belong to another config.json",
            )
    return encoder.eval()


def _require_readable(folder: Path) -> None:
    """Raise CheckpointError for a folder without weights, or with an unreadable weight file."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(path.name for path in folder.glob("*"))
        raise CheckpointError(
            f"has no .safetensors (there are {', '.join(others) or 'no files'})",
            where=str(folder),
            hint="only .safetensors are read; download the model with its safetensors files",
        )
    for path in files:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise unreadable(path, error) from None


def _not_finite(encoder: Any) -> list[str]:
    return [
        name
        for name, tensor in encoder.state_dict().items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
