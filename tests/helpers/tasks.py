"""Tasks for workers of a cluster, which import them by name."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from sfumato.data.pixel_store import PartTask, ReadPart
from sfumato.errors import DataError


def killed_once(task: PartTask) -> ReadPart:
    """Read a part, unless this is the first of all calls, which is killed."""
    try:
        (Path(task.cache).parent / "killed").mkdir(parents=True)
    except FileExistsError:
        return task.read()
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def fail(task: int) -> int:
    """Raise an error of ours."""
    raise DataError("is damaged", where="a.tar", hint="download it again")
