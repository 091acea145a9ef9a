"""metrics.jsonl: one JSON object per line, flushed as it is written."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from sfumato.platform import peak_memory
from sfumato.storage.atomic import write_text

MAX_UNWRITTEN = 8 << 20  # bytes of records that are kept while the disk is full


class MetricsFile:
    """A metrics file to which records are appended. On resume, records of steps after the
    checkpoint are dropped first, since those steps will be trained again.
    """

    def __init__(self, path: Path, *, after_step: int) -> None:
        self._path, self._unwritten = path, b""
        self._file = self._opened(after_step)

    def _opened(self, after_step: int) -> FileIO:
        records = [line for line in read_lines(self._path) if _step(line) <= after_step]
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in records))
        return self._path.open("ab", buffering=0)

    def drop_after(self, step: int) -> None:
        """Drop the records of later steps, which will be trained again."""
        self._file.close()
        self._file = self._opened(step)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; numbers that JSON lacks (NaN, infinities) become null.

        Records that could not be written, since the disk is full, are written with a later one.

        Raises:
            OSError: if the file cannot be written to; no part of a record is left in it.
        """
        line = json.dumps(finite_or_null(record)).encode() + b"\n"
        self._unwritten = (self._unwritten + line)[-MAX_UNWRITTEN:]
        size = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(self._unwritten) != len(self._unwritten):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        except OSError:
            with suppress(OSError):
                self._file.truncate(size)
            raise
        self._unwritten = b""

    def close(self) -> None:
        """Close the file; every record has been written already."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _step(line: Mapping[str, Any]) -> float:
    step = line.get("step", 0)
    return step if isinstance(step, int | float) else math.inf  # no record of ours


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the records of a metrics file; lines that a crash cut or damaged are skipped."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def peak_gib(device: torch.device) -> float:
    """Return the peak memory of this process so far in GiB: allocated on a GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_memory() / 2**30


def finite_or_null(value: Any) -> Any:
    """Replace numbers that JSON lacks (NaN, infinities) by None, at any depth."""
    if isinstance(value, Mapping):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
