"""Sets that are generated on this machine: written once into the cache, as a tar that is read like
any other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from sfumato.storage.atomic import atomic_file
from sfumato.storage.cache_folder import cache_folder

_spare_folder = lru_cache(maxsize=1)(lambda: tempfile.TemporaryDirectory(prefix="sfumato-"))


def build_once(folder: str, name: str, write: Callable[[BinaryIO], None]) -> Path:
    """Return the path of `name` in the cache's `folder`, written if it does not exist.

    If the cache cannot be written to, the file is written for this process alone.
    """
    try:
        return _write_once(cache_folder() / folder / name, write)
    except OSError:
        return _write_once(Path(_spare_folder().name, name), write)


def _write_once(target: Path, write: Callable[[BinaryIO], None]) -> Path:
    """Return `target`, written atomically if it does not exist.

    Two processes may do so at once: either file is complete.
    """
    if not target.is_file():
        with atomic_file(target) as file:
            write(file)
    return target
