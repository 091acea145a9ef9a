"""Files by path or URL, and names that must not lead anywhere else.

`local` is the one door to remote storage: it gives a path on this machine, fetched when first asked for and dropped again when
the cache is full, so that every source works on a URL without knowing it.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from sfumato.errors import DataError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(://|::)")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4096


class UnsafePath(Exception):
    """A relative path from an untrusted file that may lead elsewhere; the message is the reason."""


def is_url(path: str) -> bool:
    """Whether `path` names remote storage."""
    return _URL.match(path) is not None


def check_relative(path: str) -> str:
    """`path` if it stays below the folder that it is relative to, else UnsafePath. Links are not looked at here."""
    shown = _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", path)[:80]
    for form in (path, unquote(path)):
        parts = form.split("/")
        if not form or _UNPRINTABLE.search(form):
            raise UnsafePath(f"{shown!r} is no path that can be printed")
        if form.startswith(("/", "~")) or "\\" in form or ":" in parts[0] or is_url(form):
            raise UnsafePath(f"{shown!r} does not lie below the folder")
        if any(part in ("", ".", "..") for part in parts[:-1]) or parts[-1] in ("", ".", ".."):
            raise UnsafePath(f"{shown!r} does not lie below the folder")
        if any(_RESERVED.fullmatch(part) for part in parts):
            raise UnsafePath(f"{shown!r} is reserved by some systems")
        if len(form.encode(errors="replace")) > MAX_PATH_BYTES or any(
            len(part.encode(errors="replace")) > MAX_NAME_BYTES for part in parts
        ):
            raise UnsafePath(f"{shown!r}... is too long")
    return path


def contained(root: str, relative: str) -> str:
    """`relative` if that file lies below `root`; pictures may be links to elsewhere, texts that are shown may not.

    Raises:
        UnsafePath: if its words or a link lead elsewhere.
    """
    check_relative(relative)
    path = f"{root}/{relative}"
    if not is_url(root) and os.path.islink(path) and not Path(path).resolve().is_relative_to(Path(root).resolve()):
        raise UnsafePath(f"{relative[:80]!r} is a link to somewhere else")
    return relative


def walk(root: str) -> list[str]:
    """All files below `root` as sorted relative paths; hidden ones, pipes, devices and what lies behind linked folders are left out."""
    if is_url(root):
        found = _remote_walk(root)
    else:
        found = []
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
            paths = (Path(folder, name) for name in names if not name.startswith("."))
            # What is gone (a dangling link) stays listed, so that it can be reported.
            found.extend(path.relative_to(root).as_posix() for path in paths if path.is_file() or not path.exists())
    return sorted(found)


def exists(path: str) -> bool:
    """Whether there is a file or folder."""
    return bool(_system(path).exists(path)) if is_url(path) else Path(path).exists()


def is_folder(path: str) -> bool:
    """Whether it is a folder."""
    return bool(_system(path).isdir(path)) if is_url(path) else Path(path).is_dir()


def local(path: str) -> Path:
    """The file on this machine; one behind a URL is fetched into the cache if it is not there."""
    return _fetched(path) if is_url(path) else Path(path)


def cache_folder() -> Path:
    """Where derived data live: $SFUMATO_CACHE, else ~/.cache/sfumato. Everything in it can be made again."""
    base = os.environ.get("SFUMATO_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sfumato"
    return Path(base)


def remote_limit_bytes() -> int:
    """How much of remote files is kept on this machine: $SFUMATO_REMOTE_GIB, 20 by default."""
    return int(float(os.environ.get("SFUMATO_REMOTE_GIB") or 20) * 2**30)


@lru_cache(maxsize=16)
def _system_of(protocol: str) -> Any:
    try:
        import fsspec

        return fsspec.filesystem(protocol)
    except (ImportError, ValueError) as error:
        raise DataError(
            f"nothing here can open {protocol}:// addresses ({error})",
            where=f"{protocol}://",
            mend="pip install 'sfumato[remote]', and the package that the message names (s3fs, gcsfs, adlfs, ...)",
        ) from None


def _system(url: str) -> Any:
    return _system_of(url.partition(":")[0])


def _remote_walk(root: str) -> list[str]:
    system = _system(root)
    base = system._strip_protocol(root).rstrip("/")
    names = (name[len(base) + 1 :] for name in system.find(base))
    return [name for name in names if name and not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))]


def _fetched(url: str) -> Path:
    folder = cache_folder() / "remote"
    target = folder / hashlib.sha256(url.encode()).hexdigest()
    if target.exists():
        os.utime(target)  # a file used lately is dropped last
        return target
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, prefix=".tmp-")
    try:
        with os.fdopen(handle, "wb") as file, _system(url).open(url, "rb") as remote:
            while block := remote.read(1 << 20):
                file.write(block)
        _make_room(folder, Path(name).stat().st_size)
        os.replace(name, target)
    except Exception as error:
        Path(name).unlink(missing_ok=True)
        raise error if isinstance(error, OSError) else OSError(f"{url}: {error}") from None
    return target


def _make_room(folder: Path, size: int) -> None:
    """Drop the files used longest ago until `size` more bytes fit."""
    kept = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in folder.iterdir() if path.name[0] != ".")
    excess = sum(entry[1] for entry in kept) + size - remote_limit_bytes()
    for _, freed, path in kept:
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= freed
