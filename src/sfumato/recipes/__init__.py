"""Configurations that are known to work, and the way from a configuration to a run."""

from sfumato.recipes.builtin import RECIPES, recipe
from sfumato.recipes.launch import resolve, resume, train
from sfumato.recipes.loading import load, newest_run, snapshot
from sfumato.recipes.run import Run

__all__ = ["RECIPES", "Run", "load", "newest_run", "recipe", "resolve", "resume", "snapshot", "train"]
