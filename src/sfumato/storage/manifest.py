"""Tables of the files in a folder, with their sizes and hashes, by which damage is found."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from sfumato.errors import CheckpointError

MAX_FILES = 1000


def table_of_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the size in bytes and the SHA-256 of each file directly in a folder, by name."""
    return {
        file.name: {"bytes": file.stat().st_size, "sha256": file_digest(file)}
        for file in sorted(folder.iterdir())
        if file.is_file()
    }


def require_files(folder: Path, table: Any) -> list[str]:
    """Return the names of a folder's files, if they are as a table says.

    Sizes are compared before anything is hashed.

    Args:
        table: see `table_of_files`; it may have been written by a stranger.
    Raises:
        CheckpointError: naming the file that is missing, cut or altered, or saying that the table
            is none.
    """
    if (
        not isinstance(table, dict)
        or len(table) > MAX_FILES
        or not all(map(_is_row, table.values()))
    ):
        raise CheckpointError(
            "has no readable table of files", where=str(folder), hint="copy it again"
        )
    for name, row in table.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError("is missing", where=str(file))
        try:
            same = file.stat().st_size == row["bytes"] and file_digest(file) == row["sha256"]
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error}", where=str(file)) from None
        if not same:
            raise CheckpointError("differs from what was saved (size or hash)", where=str(file))
    return list(table)


def _is_row(row: object) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("bytes"), int)
        and isinstance(row.get("sha256"), str)
    )


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
