"""sfumato: train, check and sample diffusion models. Importing it imports no torch."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sfumato.pipeline import Pipeline
    from sfumato.recipes.launch import train
    from sfumato.recipes.loading import load

__version__ = "0.1.0"
__all__ = ["Pipeline", "__version__", "load", "train"]

_HOMES = {"Pipeline": "sfumato.pipeline", "load": "sfumato.recipes.loading", "train": "sfumato.recipes.launch"}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sfumato' has no attribute '{name}'")
