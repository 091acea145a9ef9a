"""Where and in which precision the network computes; the latter is measured on the machine and the model at hand."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from sfumato.nn.float8 import float8_layers, in_float8

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8": torch.bfloat16}  # float8 is of matrix products only
CHOICES = ("float32", "bfloat16")


def default_device() -> torch.device:
    """The graphics card if there is one, else the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose(work: Callable[[torch.dtype], None], device: torch.device, *, repeats: int = 3) -> tuple[str, str]:
    """Time `work` (one forward and backward pass) in both precisions, in turn; the faster one's name, and a line that says so.

    bfloat16 must win by a tenth: it rounds, so it has to pay.
    """
    seconds: dict[str, list[float]] = {name: [] for name in CHOICES}
    for repeat in range(repeats + 1):
        for name in CHOICES:
            begun = time.perf_counter()
            work(DTYPES[name])
            finish(device)
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    chosen = "bfloat16" if medians["bfloat16"] < 0.9 * medians["float32"] else "float32"
    measured = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in medians.items())
    return chosen, f"precision {chosen}: measured {measured} a pass"


def finish(device: torch.device) -> None:
    """Wait for what a GPU was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def require(network: nn.Module, name: str) -> None:
    """Raise ConfigError where a precision needs what the network or the machine does not have."""
    if name == "float8":
        float8_layers(network)


def prepare(network: nn.Module, name: str) -> None:
    """Change a network's layers, in place, where a precision is more than the dtype of their context."""
    if name == "float8":
        in_float8(network)
