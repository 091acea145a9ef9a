"""The files that a run has written, as its report reads them."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from sfumato.observability.metrics_file import read_lines
from sfumato.storage.run_directory import RunDirectory
from sfumato.training.evidence import Look, looks_of
from sfumato.training.stopping import StoppingVerdict, verdict


class RunFiles:
    """What a run has written, read when it is first used."""

    def __init__(self, path: Path) -> None:
        self.directory = RunDirectory.existing(path)

    @cached_property
    def looks(self) -> list[Look]:
        """The looks at held-out images, in the order of their steps."""
        return looks_of(read_lines(self.directory.looks), self.directory.data_record())

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl."""
        return read_lines(self.directory.metrics)

    @cached_property
    def verdicts(self) -> list[StoppingVerdict]:
        """The verdict at each look."""
        return [verdict(self.looks[: number + 1]) for number in range(len(self.looks))]

    def json(self, name: str) -> dict[str, Any]:
        """Return a JSON file of the run; {} if it is missing or damaged."""
        try:
            return dict(json.loads((self.directory.path / name).read_text()))
        except (OSError, ValueError):
            return {}

    def newest(self, key: str) -> dict[str, Any]:
        """Return the newest record of metrics that has a key; {} without any."""
        return next((line for line in reversed(self.metrics) if key in line), {})
