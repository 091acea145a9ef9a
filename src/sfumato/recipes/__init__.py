"""Configurations that are known to work, and the way from a configuration to a run. Importing it imports no torch."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sfumato.recipes.builtin import RECIPES, recipe
    from sfumato.recipes.launch import resolve, resume, train
    from sfumato.recipes.loading import load, newest_run, snapshot
    from sfumato.recipes.run import Run

__all__ = ["RECIPES", "Run", "load", "newest_run", "recipe", "resolve", "resume", "snapshot", "train"]

_HOMES = {
    "builtin": ("RECIPES", "recipe"),
    "launch": ("resolve", "resume", "train"),
    "loading": ("load", "newest_run", "snapshot"),
    "run": ("Run",),
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"sfumato.recipes.{home}"), name)
    raise AttributeError(f"module 'sfumato.recipes' has no attribute '{name}'")
