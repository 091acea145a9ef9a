"""What the file system says of the files that a source is read from: whether they are those that were
read before, without reading them again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from sfumato.data import files
from sfumato.data.listing import Blob, Source

# size; times of change, of the contents and of anything, in ns; number of the file (inode). The second
# time cannot be set, so that an edit that keeps size and first time is seen
Signs = tuple[int, int, int, int]


class SourceState(NamedTuple):
    """The state of a source: a hash of its settings and of what is known of its files, and the
    newest time of change among them, in ns.
    """

    hash: str
    newest_ns: int


def state_of(source: Source) -> SourceState | None:
    """Return the state of a source; None if more than files on this machine may change its listing."""
    path = getattr(source, "path", None)
    if not source.is_of_files or path is None or files.is_url(path) or not os.path.exists(path):
        return None
    try:
        found = sorted(_signs(path).items())
    except OSError:  # said when it is read
        return None
    result = hashlib.sha256(f"{_code()} {source!r} {os.path.realpath(path)}".encode())
    newest = 0
    for name, signs in found:
        result.update(f"{name}\0{signs}\n".encode(errors="surrogatepass"))
        newest = max(newest, *signs[1:3])
    return SourceState(result.hexdigest()[:32], newest)


def _signs(path: str) -> dict[str, Signs]:
    """Return the signs of all files below a path that are not hidden, by name."""
    if not os.path.isdir(path):
        return {"": _of(os.stat(path))}
    found: dict[str, Signs] = {}
    entered: set[tuple[int, int]] = set()
    folders = [(path, "")]
    while folders:
        folder, prefix = folders.pop()
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in entered:
            continue
        entered.add((state.st_dev, state.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                with contextlib.suppress(OSError):  # a dangling link
                    if entry.is_dir():
                        folders.append((entry.path, f"{prefix}{entry.name}/"))
                        continue
                found[prefix + entry.name] = _entry_signs(entry)
    return found


def _entry_signs(entry: os.DirEntry[str]) -> Signs:
    try:
        return _of(entry.stat())
    except OSError:
        return (-1, 0, 0, 0)


def _of(state: os.stat_result) -> Signs:
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino


class Identities:
    """Numbers for the bytes of images, by what the file system says of their files: equal numbers mean
    equal bytes.
    """

    def __init__(self) -> None:
        self._path, self._known = "", ""  # images of one container come one after another

    def of(self, blob: Blob) -> int | None:
        """Return the number of an image; None if the file system says too little of it."""
        inner = getattr(blob, "file", blob)  # a frame's file
        path = getattr(inner, "path", None)
        signs = "" if path is None else self._of_file(path)
        if not signs:
            return None
        digest = hashlib.blake2b(f"{blob!r} {signs}".encode(errors="surrogatepass"), digest_size=8)
        return int.from_bytes(digest.digest(), "little", signed=True)

    def _of_file(self, path: str) -> str:
        if path != self._path:
            self._path, self._known = path, ""
            with contextlib.suppress(OSError):
                state = os.stat(path)
                if not files.is_url(path) and stat.S_ISREG(state.st_mode):
                    self._known = str(_of(state))
        return self._known


@lru_cache
def _code() -> str:
    """Return a hash of the code that reads data: what it has found before may be found otherwise by
    another version.
    """
    result = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        result.update(file.read_bytes())
    return result.hexdigest()
