"""metrics.jsonl: one JSON object per line, flushed as it is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import torch

from sfumato.platform import peak_memory
from sfumato.storage.atomic import write_text


class MetricsFile:
    """A metrics file to which records are appended. On resume, records of steps after the
    checkpoint are dropped first, since those steps will be trained again.
    """

    def __init__(self, path: Path, *, after_step: int) -> None:
        self._path = path
        self._file = self._opened(after_step)

    def _opened(self, after_step: int) -> TextIO:
        records = [line for line in read_lines(self._path) if _step(line) <= after_step]
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in records))
        return self._path.open("a")

    def drop_after(self, step: int) -> None:
        """Drop the records of later steps, which will be trained again."""
        self._file.close()
        self._file = self._opened(step)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; numbers that JSON lacks (NaN, infinities) become null."""
        self._file.write(json.dumps(finite_or_null(record)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; every record has been flushed already."""
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
