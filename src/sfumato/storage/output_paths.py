"""Check that a command can write its output before it does the work, so that no work is lost."""

from __future__ import annotations

import contextlib
import re
import tempfile
from pathlib import Path

from sfumato.errors import OutputError, RunError

MAX_NAME_BYTES = 80
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # devices on Windows


def require_writable(folder: Path, target: Path | None = None, *, option: str = "--out") -> Path:
    """Return `folder` if it can be created and written to; this is tried and leaves no trace.

    Args:
        target: a file in it that will be replaced.
        option: the command-line option that names another place.
    Raises:
        RunError: naming `option`, if it cannot be written to or `target` is a folder.
    """
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".sfumato-"):
                pass
        finally:
            for path in missing:
                with contextlib.suppress(OSError):
                    path.rmdir()
        if target is not None and target.is_dir():
            raise IsADirectoryError("a folder of that name exists")
    except OSError as error:
        raise RunError(
            f"cannot be written to: {error.strerror or error}",
            where=str(target or folder),
            hint=f"choose another place with {option}, or change its permissions",
        ) from None
    return folder


def safe_name(name: str) -> str:
    """Return a name as one that a folder may have on any system: it leads nowhere else.

    Other characters than letters, digits, spaces, dots, hyphens and underscores become hyphens.
    """
    plain = re.sub(r"[^\w .-]|\s(?<! )", "-", name).strip(" .")
    short = plain.encode()[:MAX_NAME_BYTES].decode(errors="ignore").strip(" .")
    return f"run-{short}" if not short or RESERVED.fullmatch(short) else short


def require_free(path: Path) -> Path:
    """Return `path` if there is nothing there yet and it can be created.

    Raises:
        OutputError: if there is a file or folder of that name.
        RunError: if its folder cannot be written to.
    """
    if path.exists() or path.is_symlink():
        raise OutputError(
            "exists already", where=str(path), hint="choose another place with --out, or remove it"
        )
    require_writable(path.parent)
    return path
