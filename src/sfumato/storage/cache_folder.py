"""Where derived data are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder of derived data, all of which can be made again.

    It is $SFUMATO_CACHE, else `sfumato` in $XDG_CACHE_HOME, else ~/.cache/sfumato.
    """
    base = (
        os.environ.get("SFUMATO_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sfumato"
    )
    return Path(base)
