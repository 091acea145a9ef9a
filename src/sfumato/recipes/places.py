"""Where a run's data are: named once by a person, from wherever they stood, and found again from anywhere, also when both have moved."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfumato.data import HuggingFace, files
from sfumato.errors import DataError
from sfumato.recipes.run import Run

FROM_RUN = "paths_from_run"  # in data.json
HUB = HuggingFace.__name__  # whose path may be a name elsewhere


def settled(run: Run) -> Run:
    """The same run with the paths of its data made absolute, so that they mean the same in every folder."""
    data = run.data
    path, exclude = getattr(data.source, "path", None), data.exclude
    if path is not None and _is_local(path) and os.path.exists(path):
        data = replace(data, source=replace(data.source, path=os.path.abspath(path)))  # type: ignore[call-arg]
    if exclude is not None:
        data = replace(data, exclude=os.path.abspath(exclude))
    return replace(run, data=data)


def from_run(run: Run, directory: Path) -> dict[str, str]:
    """The paths of the data as they look from the run's own folder: what data.json keeps, for when both are moved together."""
    found = {"path": getattr(run.data.source, "path", None), "exclude": run.data.exclude}
    there = {key: path for key, path in found.items() if path is not None and _is_local(path) and os.path.exists(path)}
    return {key: os.path.relpath(path, directory) for key, path in there.items()}


def found_again(plain: dict[str, Any], directory: Path) -> dict[str, Any]:
    """A run's configuration, as plain data, with the paths of its data where they are now: as it says, or as seen from the run."""
    data = plain.get("data")
    if not isinstance(data, dict):
        return plain
    source = data.get("source")
    for holder, key in ((source if isinstance(source, dict) else {}, "path"), (data, "exclude")):
        path = holder.get(key)
        if isinstance(path, str) and _is_local(path) and holder.get("kind") != HUB and not os.path.exists(path):
            near = next((place for place in _candidates(path, key, directory) if os.path.exists(place)), None)
            if near is not None:
                holder[key] = os.path.abspath(near)
    return plain


def _candidates(path: str, key: str, directory: Path) -> Iterator[str]:
    """Where data may be that are not where a run says: as far from it as they were; in older runs, below a folder that holds the run."""
    try:
        known = json.loads((directory / "data.json").read_text(encoding="utf-8")).get(FROM_RUN, {})
    except (OSError, ValueError, AttributeError):
        known = {}
    if isinstance(known, dict) and isinstance(known.get(key), str):
        yield os.path.join(directory, known[key])
    elif not os.path.isabs(path):
        yield from (os.path.join(parent, path) for parent in directory.absolute().parents)


def require_there(run: Run) -> None:
    """Raise DataError, naming the key, if the run's data should be on this machine and are not where it says."""
    path, kind = getattr(run.data.source, "path", None), type(run.data.source).__name__
    if path is not None and kind != HUB and _is_local(path) and not os.path.exists(path):
        raise DataError(
            f"{path}: no such file or folder",
            where="data.source.path",
            mend=f"if the data ({kind}) have moved, say where they are: data.source.path=NEW/PLACE; "
            "a relative path starts at the folder that the command is run in",
        )


def _is_local(path: str) -> bool:
    return not files.is_url(path) and not path.startswith("hub:")
