"""Configurations: built-in ones, those chosen from data, and those read from files.

Importing this package does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sfumato.recipes.builtin import RECIPES, recipe
    from sfumato.recipes.resolver import resolve
    from sfumato.recipes.run import Run

__all__ = ["RECIPES", "Run", "recipe", "resolve"]

_HOMES = {"RECIPES": "builtin", "Run": "run", "recipe": "builtin", "resolve": "resolver"}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"sfumato.recipes.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sfumato.recipes' has no attribute '{name}'")
