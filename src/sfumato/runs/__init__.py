"""Runs: prepare, predict, train, resume and load them.

Importing this package does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sfumato.runs.evaluation import evaluate_run
    from sfumato.runs.loading import load, newest_run, snapshot
    from sfumato.runs.preparation import PreparedRun, prepare
    from sfumato.runs.training import finetune, resume, train

__all__ = [
    "PreparedRun",
    "evaluate_run",
    "finetune",
    "load",
    "newest_run",
    "prepare",
    "resume",
    "snapshot",
    "train",
]

_HOMES = {
    "PreparedRun": "preparation",
    "evaluate_run": "evaluation",
    "finetune": "training",
    "load": "loading",
    "newest_run": "loading",
    "prepare": "preparation",
    "resume": "training",
    "snapshot": "loading",
    "train": "training",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"sfumato.runs.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sfumato.runs' has no attribute '{name}'")
