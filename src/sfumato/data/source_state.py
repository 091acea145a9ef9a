"""What the file system says of the files that a source is read from: whether they are those that were
read before, without reading them again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
from dataclasses import fields, is_dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sfumato.data import files, remote
from sfumato.data.listing import Blob, Source, SourceState
from sfumato.errors import DataError, redact_secrets

# size; times of change, of the contents and of anything, in ns; number of the file (inode). The second
# time cannot be set, so that an edit that keeps size and first time is seen
Signs = tuple[int, int, int, int]
NO_SIGNS = (-1, 0, 0, 0)
# files changed so shortly before they were read may change again without another time of change
RECENT_NS = 2 * 10**9
TIME = 1 if os.name == "nt" else 2  # there, the second time is that of creation


def state_of(source: Source, *, notes: bool = True) -> SourceState | None:
    """Return the state of a source; None if more than files may change its listing, or their store does
    not say when they change.

    Args:
        notes: see `remote.signs_below`.
    """
    path = getattr(source, "path", None)
    # a kind that derives from one of these may read more
    if not vars(type(source)).get("is_of_files") or path is None:
        return None
    try:
        found = _remote_signs(path, notes=notes) if files.is_url(path) else _signs(path)
    except (OSError, DataError):  # said when it is read
        return None
    result = hashlib.sha256(_bytes(f"{_code()} {source!r} {absolute(path)}"))
    newest = 0
    for name, signs, target in found:
        text, time_ns = signs if isinstance(signs, remote.Sign) else (str(signs), signs[TIME])
        result.update(_bytes(f"{name}\0{text}\0{target}\n"))
        newest = max(newest, time_ns)
    return SourceState(result.hexdigest()[:32], newest)


def absolute(path: str) -> str:
    """Return a path as it is from anywhere on this machine."""
    return path if files.is_url(path) else os.path.realpath(path)


def _remote_signs(path: str, *, notes: bool) -> list[tuple[str, remote.Sign, str]]:
    """Return names and signs of all files that a listing of an address sees.

    Raises:
        OSError: if the store does not say of each whether it has changed, or if the address has a secret,
            which is not to be kept.
    """
    found = {
        name: sign
        for name, sign in remote.signs_below(path, notes=notes).items()
        if not files.is_hidden(name.split("/"))
    }
    if redact_secrets(path) != path:
        raise OSError("the address has a secret")
    if not all(sign.text for sign in found.values()) or files.is_page(path):
        raise OSError("the store does not say when its files change")
    return [(name, sign, "") for name, sign in sorted(found.items())]


def _signs(path: str) -> list[tuple[str, Signs, str]]:
    """Return, of all files that a listing sees, the names, signs, and targets of links."""
    if not os.path.isdir(path):
        return [("", _of(os.stat(path)), "")]
    failed = files.failed_reads()
    walk = files.explore(path)
    if files.failed_reads() != failed:
        raise OSError("cannot be listed as a whole")
    passed = [(name, NO_SIGNS, reason) for name, reason in walk.passed_over]
    return [*(_file_signs(path, name) for name in walk.names), *passed]


def _file_signs(root: str, name: str) -> tuple[str, Signs, str]:
    path = f"{root}/{name}"
    target = os.readlink(path) if os.path.islink(path) else ""
    try:
        return name, _of(os.stat(path)), target
    except OSError:  # a dangling link
        return name, NO_SIGNS, target


def _of(state: os.stat_result) -> Signs:
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


class Identities:
    """Numbers for the bytes of images, by what the file system says of their files: equal numbers mean
    equal bytes, wherever the files lie.
    """

    def __init__(self) -> None:
        self._last = ("", "")  # images of one container come one after another
        self._lasting = time.time_ns() - RECENT_NS

    def of(self, blob: Blob) -> int | None:
        """Return the number of an image; None if the file system says too little of it."""
        inner = getattr(blob, "file", None)  # what this is computed from, by code that may change
        path = getattr(blob if inner is None else inner, "path", None)
        signs = "" if path is None else self._of_file(path)
        if not signs or not is_dataclass(blob) or not is_dataclass(inner or blob):
            return None
        made_by = "" if inner is None else f"{_place(inner)} {_code()}"
        digest = hashlib.blake2b(_bytes(f"{_place(blob)} {made_by} {signs}"), digest_size=8)
        return int.from_bytes(digest.digest(), "little", signed=True)

    def _of_file(self, path: str) -> str:
        if files.is_url(path):  # which is part of the number, as an inode is
            sign = remote.sign_of(path)
            return f"{path} {sign}" if sign else ""
        last, signs = self._last  # several threads ask
        if path != last:
            signs = ""
            with contextlib.suppress(OSError):
                state = os.stat(path)
                found = _of(state)
                regular = stat.S_ISREG(state.st_mode)
                if regular and found[TIME] < self._lasting:
                    signs = str(found)
            self._last = (path, signs)
        return signs


def _place(blob: Blob) -> str:
    """Return where in its file a blob is."""
    kind = type(blob)
    parts = [
        repr(getattr(blob, field.name))
        for field in fields(kind)  # type: ignore[arg-type]
        if field.name not in ("path", "file")
    ]
    return f"{kind.__name__}({', '.join(parts)})"


@lru_cache
def _code() -> str:
    """Return a hash of the code that reads data, and of the versions of libraries that it uses: others
    may find something else in the same files.
    """
    result = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        result.update(file.read_bytes())
    for name in ("pillow", "numpy", "pyarrow", "charset-normalizer"):
        with contextlib.suppress(PackageNotFoundError):
            result.update(f"{name} {version(name)}".encode())
    return result.hexdigest()
