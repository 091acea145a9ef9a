"""Output that nobody reads any more is dropped: a closed pipe or terminal must not end a training."""

from __future__ import annotations

import sys
from typing import Any, TextIO


class PatientStream:
    """A text stream whose writes succeed even if its reader has gone; what is written is then lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, if anybody reads it."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # ValueError: the stream is closed
            return len(text)

    def flush(self) -> None:
        """Flush the stream, if anybody reads it."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return


def be_patient() -> None:
    """Replace standard output and standard error by patient ones."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, PatientStream):
            setattr(sys, name, PatientStream(stream))
