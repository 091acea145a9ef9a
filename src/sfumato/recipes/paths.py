"""The paths of a run's data.

They are given once, relative to any folder, and found again from every other, even after both have
moved.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sfumato import config as configuration
from sfumato.data import HuggingFace, files
from sfumato.errors import DataError
from sfumato.recipes.run import Run
from sfumato.storage.run_directory import RunDirectory

FROM_RUN = "paths_from_run"  # in data.json
HUB = HuggingFace.__name__  # whose path may be a name elsewhere
KEYS = (
    "data.source.path",
    "data.exclude",
    "autoencoder.path",
    "autoencoder.decoder",
    "autoencoder.features",
    "base",
    "adapter.initial",
    "network.path",
    "preservation.source",
    "conditioner.text.encoder",
    "conditioner.text.path",
    "auxiliary.alignment.encoder",
)
DATA = KEYS[:2]
SECRET = "***"  # what stands for one, see `redact_secrets`
NAMES = {"auto", "random", "efficientnet-lite0"}  # of what needs no file, whatever files there are


def with_absolute_paths(run: Run) -> Run:
    """Return the run with the paths of what is on this machine made absolute.

    They then mean the same in every folder.
    """
    plain = configuration.plain(run)
    for _, holder, name in path_entries(plain):
        if os.path.exists(holder[name]):
            holder[name] = os.path.abspath(holder[name])
    return configuration.parse(Run, plain, where=run.name)


def paths_relative_to_run(run: Run, directory: Path) -> dict[str, str]:
    """Return those paths as they are seen from the run's own folder.

    data.json keeps them, for when both are moved together.
    """
    local = ((key, holder[name]) for key, holder, name in path_entries(configuration.plain(run)))
    return {key: os.path.relpath(path, directory) for key, path in local if os.path.exists(path)}


def relocate_paths(plain: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Replace the paths in a run's configuration, as plain data, by where things are now.

    A path that does not exist is looked for where it was as seen from the run. The mapping is
    changed in place and returned.
    """
    relative = _relative_paths(directory)
    for key, holder, name in path_entries(plain):
        if not os.path.exists(holder[name]):
            near = next(
                (
                    place
                    for place in _candidates(key, holder[name], relative, directory)
                    if os.path.exists(place)
                ),
                None,
            )
            holder[name] = holder[name] if near is None else os.path.abspath(near)
    return plain


def path_entries(plain: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield (key, mapping that holds it, name there) of every path that may be on this machine."""
    for key in KEYS:
        *parents, name = key.split(".")
        holder: Any = plain
        for parent in parents:
            holder = holder.get(parent) if isinstance(holder, dict) else None
        if (
            isinstance(holder, dict)
            and isinstance(holder.get(name), str)
            and _is_local(holder[name])
            and holder[name] not in NAMES
        ):
            yield key, holder, name


def _candidates(key: str, path: str, relative: Mapping[str, Any], directory: Path) -> Iterator[str]:
    """Yield where something may be that is not where a run says.

    It may be at the same place as seen from the run. In older runs, which do not record that, data
    may be below a folder that holds the run.
    """
    if isinstance(relative.get(key), str):
        yield os.path.join(directory, relative[key])
    elif key in DATA and not relative and not os.path.isabs(path):
        yield from (os.path.join(parent, path) for parent in directory.absolute().parents)


def _relative_paths(directory: Path) -> Mapping[str, Any]:
    relative = RunDirectory(directory).data_record().get(FROM_RUN)
    return relative if isinstance(relative, dict) else {}


def require_there(run: Run) -> None:
    """Raise DataError, naming the key, if the run's data should be on this machine but are not."""
    path, kind = getattr(run.data.source, "path", None), type(run.data.source).__name__
    if path is not None and SECRET in path:
        raise DataError(
            f"{path}: the secret of this address was not stored with the run",
            where="data.source.path",
            hint="give the address again: `sfumato resume RUN data.source.path=...`",
        )
    if path is not None and kind != HUB and _is_local(path) and not os.path.exists(path):
        raise DataError(
            f"{path}: no such file or folder",
            where="data.source.path",
            hint=f"if the data ({kind}) have moved, say where they are: "
            "data.source.path=NEW/PLACE; "
            "a relative path starts at the folder that the command is run in",
        )


def _is_local(path: str) -> bool:
    return not files.is_url(path) and not path.startswith("hub:")
