"""The configuration of a run on disk: config.yaml, which says whether it is as it was written.

A run continues with what it was trained with: where config.yaml was cut, edited or damaged, the
configuration that the newest checkpoint was written under takes its place, except for the places of
files, whose contents are checked by their hashes.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from sfumato import config as configuration
from sfumato.errors import CheckpointError, ConfigError, without_secrets
from sfumato.observability.progress import console
from sfumato.recipes.paths import path_entries, relocate_paths
from sfumato.recipes.run import Run
from sfumato.recipes.run_origin import SEAL, seal
from sfumato.storage import checkpoint
from sfumato.storage.atomic import write_text
from sfumato.storage.run_directory import RunDirectory

HEADER = (
    "# Written by sfumato. To change a setting, give it to `sfumato resume`: what is edited here is\n"
    "# not used, except where data and models lie.\n"
    "# sha256 of the lines below: "
)
SHOWN = 8  # differing settings that a warning lists


def write_run_config(directory: RunDirectory, plain: dict[str, Any]) -> None:
    """Replace config.yaml, with a hash of what it says; secrets in addresses are left out."""
    if not directory.writes:
        return
    body = configuration.dump_yaml(without_secrets(plain))
    text = f"{HEADER}{_digest(body)}\n{body}"
    write_text(directory.config, text, durable=True)
    directory.write_json(SEAL, seal(text))


def read_run_config(path: Path) -> dict[str, Any]:
    """Return the configuration of a run directory as plain data, with paths to where things are now.

    Raises:
        ConfigError: if config.yaml is damaged and no checkpoint says what it was.
    """
    return relocate_paths(_trusted(path), path)


def _trusted(path: Path) -> dict[str, Any]:
    """Return what config.yaml says if it is as it was written, or what the newest checkpoint says."""
    file = path / "config.yaml"
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    if is_as_written(text):
        return _parsed(file)
    pinned = pinned_config(path)
    if pinned is None:
        if HEADER in text:
            raise ConfigError(
                "differs from what sfumato wrote (hash), and the run has no checkpoint to restore "
                "it from",
                where=str(file),
                hint="give changes to `sfumato resume` or `sfumato train` as settings, or begin a "
                "new run",
            )
        return _parsed(file)
    try:
        written = _parsed(file)
    except ConfigError as error:
        _warn(f"{error.args[0].splitlines()[0]}; the newest checkpoint's configuration is used")
        return pinned
    result = _with_places_of(written, pinned)
    if lines := configuration.differences(written, result):
        more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        _warn(
            f"{file} is not what the run was trained with, which is used instead: "
            f"{'; '.join(lines[:SHOWN])}{more}. To change a setting, give it to `sfumato resume`"
        )
    return result


def is_as_written(text: str) -> bool:
    """Return whether the text of a config.yaml has the hash of what it says."""
    _, _, rest = text.partition(HEADER)
    stated, _, body = rest.partition("\n")
    return text.startswith(HEADER) and stated.strip() == _digest(body)


def pinned_config(path: Path) -> dict[str, Any] | None:
    """Return the configuration that a run's newest readable checkpoint was written under.

    None if it has no checkpoint.
    """
    for newest in checkpoint.paths(path / "checkpoints"):
        try:
            return _full(checkpoint.configuration_of(newest), str(newest))
        except (CheckpointError, ConfigError):
            continue
    return None


def _parsed(file: Path) -> dict[str, Any]:
    return _full(configuration.load_yaml_file(file), str(file))


def _full(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a configuration with all its keys, in current words."""
    filled = configuration.fill_former_defaults(Run, data)
    plain: dict[str, Any] = configuration.plain(configuration.parse(Run, filled, where=where))
    return plain


def _with_places_of(written: dict[str, Any], pinned: dict[str, Any]) -> dict[str, Any]:
    """Return the pinned configuration with the paths that config.yaml names."""
    result = configuration.merge(pinned, {})
    places = {key: holder[name] for key, holder, name in path_entries(written)}
    for key, holder, name in path_entries(result):
        if key in places:
            holder[name] = places[key]
    return result


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


@lru_cache
def _warn(line: str) -> None:
    """Print a warning once, however often a command reads the configuration."""
    console().print(f"warning: {line}", markup=False)
