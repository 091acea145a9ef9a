"""`torch.compile`, and whether this machine can use it."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from torch import nn

from sfumato.errors import ConfigError

NEEDED = "needs a C++ compiler and Python's headers"


def can_compile() -> bool:
    """Return whether the C++ compiler and Python's headers that `torch.compile` needs exist."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return (
        shutil.which(compiler) is not None
        and (Path(sysconfig.get_path("include")) / "Python.h").is_file()
    )


def require_compiler() -> None:
    """Raise ConfigError if this machine lacks what compiling needs."""
    if not can_compile():
        raise ConfigError(
            NEEDED, where="compile", hint="apt install g++ python3-dev, or leave it off"
        )


def compile_in_place(network: nn.Module, *, mode: str = "default") -> None:
    """Have `network` compiled when it is first called.

    Args:
        mode: of `torch.compile`; with `reduce-overhead` a GPU replays graphs, and an output is
            valid only until the next call.
    Raises:
        ConfigError: if this machine lacks what compiling needs.
    """
    require_compiler()
    network.compile(mode=mode)
