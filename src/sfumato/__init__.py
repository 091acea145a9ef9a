"""sfumato: train, check and sample diffusion models. Importing it does not import torch."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sfumato.generation.adjusted import with_clip_skip, with_embedded_guidance
    from sfumato.generation.pipeline import Pipeline
    from sfumato.interop.control_files import with_control
    from sfumato.interop.embedding import with_embedding
    from sfumato.interop.lora import with_lora
    from sfumato.recipes.builtin import recipe
    from sfumato.recipes.resolver import resolve
    from sfumato.recipes.run import Run
    from sfumato.runs.export import export
    from sfumato.runs.loading import load
    from sfumato.runs.training import finetune, resume, train

__version__ = "0.1.0"
__all__ = [
    "Pipeline",
    "Run",
    "__version__",
    "export",
    "finetune",
    "load",
    "recipe",
    "resolve",
    "resume",
    "train",
    "with_clip_skip",
    "with_control",
    "with_embedded_guidance",
    "with_embedding",
    "with_lora",
]

_HOMES = {
    "Pipeline": "sfumato.generation.pipeline",
    "Run": "sfumato.recipes.run",
    "export": "sfumato.runs.export",
    "load": "sfumato.runs.loading",
    "recipe": "sfumato.recipes.builtin",
    "resolve": "sfumato.recipes.resolver",
    "finetune": "sfumato.runs.training",
    "resume": "sfumato.runs.training",
    "train": "sfumato.runs.training",
    "with_control": "sfumato.interop.control_files",
    "with_clip_skip": "sfumato.generation.adjusted",
    "with_embedded_guidance": "sfumato.generation.adjusted",
    "with_embedding": "sfumato.interop.embedding",
    "with_lora": "sfumato.interop.lora",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sfumato' has no attribute '{name}'")
