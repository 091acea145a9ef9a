"""Sets that are made on this machine: written once into the cache, as a tar that is read like any
other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from sfumato.data import files
from sfumato.storage.atomic import atomic_file

_spare_folder = lru_cache(maxsize=1)(lambda: tempfile.TemporaryDirectory(prefix="sfumato-"))


def build_once(folder: str, name: str, write: Callable[[BinaryIO], None]) -> Path:
    """`name` in the cache's `folder`, written if it is not there; for this process alone if the
    cache cannot be written to.
    """
    try:
        return _made(files.cache_folder() / folder / name, write)
    except OSError:
        return _made(Path(_spare_folder().name, name), write)


def _made(target: Path, write: Callable[[BinaryIO], None]) -> Path:
    """`target`, written beside its place and put there whole: of two processes that do so at once,
    both win.
    """
    if not target.is_file():
        with atomic_file(target) as file:
            write(file)
    return target
