"""metrics.jsonl: one JSON object per line, flushed as it is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from sfumato.platform import peak_memory
from sfumato.storage.atomic import write_text


class MetricsFile:
    """A metrics file to which records are appended. On resume, records of steps after the
    checkpoint are dropped first, since those steps will be trained again.
    """

    def __init__(self, path: Path, *, after_step: int) -> None:
        records = [line for line in read_lines(path) if line.get("step", 0) <= after_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in records))
        self._file = path.open("a")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; numbers that JSON lacks (NaN, infinities) become null."""
        self._file.write(json.dumps(_finite(record)) + "\n")
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


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the records of a metrics file; a line truncated by a crash is skipped."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def peak_gib(device: torch.device) -> float:
    """Return the peak memory of this process so far in GiB: allocated on a GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_memory() / 2**30


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
