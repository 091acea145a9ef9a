"""Files by path or URL, and checks of names that must not lead anywhere else.

`local` is the only access to remote storage: it returns a path on this machine, fetched on first
use and dropped again when the cache is full, so that every source works on a URL without knowing
it.
"""

from __future__ import annotations

import errno
import os
import re
from collections import deque
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from sfumato.data import remote
from sfumato.data.file_types import ARCHIVES
from sfumato.storage.output_paths import RESERVED

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(://|::)")
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
HTTP = ("http://", "https://")
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4096


class UnsafePath(Exception):
    """A relative path from an untrusted file that may lead elsewhere; the message is the reason."""


def is_url(path: str) -> bool:
    """Return whether `path` names remote storage."""
    return _URL.match(path) is not None


def check_relative(path: str) -> str:
    """Return `path` if it stays below the folder that it is relative to. Links are not checked.

    Raises:
        UnsafePath: if it may lead elsewhere, is not printable, is too long, or has a name that some
            systems reserve.
    """
    printable = UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", path)[:80]
    for form in (path, unquote(path)):
        parts = form.split("/")
        if not form or UNPRINTABLE.search(form):
            raise UnsafePath(f"{printable!r} is not a printable path")
        if form.startswith(("/", "~")) or "\\" in form or ":" in parts[0] or is_url(form):
            raise UnsafePath(f"{printable!r} is not below the folder")
        if any(part in ("", ".", "..") for part in parts[:-1]) or parts[-1] in ("", ".", ".."):
            raise UnsafePath(f"{printable!r} is not below the folder")
        if any(is_reserved(part) for part in parts):
            raise UnsafePath(f"{printable!r} is reserved by some systems")
        if len(form.encode(errors="replace")) > MAX_PATH_BYTES or any(
            len(part.encode(errors="replace")) > MAX_NAME_BYTES for part in parts
        ):
            raise UnsafePath(f"{printable!r}... is too long")
    return path


def is_reserved(name: str) -> bool:
    """Return whether a name means a device on some systems."""
    return RESERVED.fullmatch(name) is not None


def check_contained(root: str, relative: str) -> str:
    """Return `relative`, a name from an untrusted file, if it lies below `root`.

    See `check_relative` and `check_link`.

    Raises:
        UnsafePath: if the name itself or a link leads elsewhere.
    """
    return check_link(root, check_relative(relative))


def check_link(root: str, relative: str) -> str:
    """Return `relative` if it is not a link to a file outside of `root`.

    Images may be such links; texts that are shown may not.

    Raises:
        UnsafePath: if it is one.
    """
    path = f"{root}/{relative}"
    if (
        not is_url(root)
        and os.path.islink(path)
        and not Path(path).resolve().is_relative_to(Path(root).resolve())
    ):
        raise UnsafePath(f"{relative[:80]!r} is a link to somewhere else")
    return relative


def is_hidden(folders: list[str]) -> bool:
    """Return whether systems hide any of the names, or add it by themselves.

    `.` and `..` are not hidden: they lead elsewhere.
    """
    return any(name.startswith((".", "__MACOSX")) and name not in (".", "..") for name in folders)


class Walk(NamedTuple):
    """What lies below a folder: files as sorted relative paths, and what was passed over, with the
    reasons.
    """

    names: list[str]
    passed_over: list[tuple[str, str]]


def walk(root: str) -> list[str]:
    """List all files below `root` as sorted relative paths; see `explore`."""
    return explore(root).names


def explore(root: str) -> Walk:
    """List all files below `root`, also those behind linked folders; hidden ones are left out.

    A linked folder is entered once all folders of the tree itself have been, and only if nothing in
    it has been read already, so that circular links end and nothing counts twice. A dangling link
    stays listed, so that it can be reported.
    """
    if is_url(root):
        return Walk(sorted(_remote_walk(root)), [])
    names: list[str] = []
    passed_over: list[tuple[str, str]] = []
    entered: set[str] = set()
    queue = deque([(root, "")])
    while queue:
        place, prefix = queue.popleft()
        target = os.path.realpath(place)
        if prefix and target in entered:
            passed_over.append(
                (prefix.rstrip("/"), "a link to a folder that is read under its own path")
            )
            continue
        if prefix and os.path.realpath(os.path.dirname(place)).startswith(target.rstrip("/") + "/"):
            passed_over.append((prefix.rstrip("/"), "a link to a folder around it"))
            continue
        for folder, folders, files in os.walk(place, onerror=note_failure):
            relative = prefix + (
                f"{Path(folder).relative_to(place).as_posix()}/" if folder != place else ""
            )
            real = os.path.realpath(folder)
            if real in entered:
                passed_over.append((relative.rstrip("/"), "has already been read through a link"))
                folders.clear()
                continue
            entered.add(real)
            visible = sorted(name for name in folders if not is_hidden([name]))
            linked = [name for name in visible if os.path.islink(os.path.join(folder, name))]
            queue.extend((os.path.join(folder, name), f"{relative}{name}/") for name in linked)
            folders[:] = [name for name in visible if name not in linked]
            for name in files:
                path = os.path.join(folder, name)
                if name.startswith("."):
                    continue
                if not os.path.isfile(path) and os.path.exists(path):
                    passed_over.append((relative + name, "a pipe or device"))
                else:
                    names.append(relative + name)
    return Walk(sorted(names), sorted(passed_over))


def exists(path: str) -> bool:
    """Return whether there is a file or folder at a path or URL."""
    if not is_url(path):
        return os.path.exists(path)
    found = bool(remote.ask(path, "exists"))
    if not found and path.startswith(HTTP):
        remote.require_answer(path)
    return found


def is_folder(path: str) -> bool:
    """Return whether there is a folder at a path or URL."""
    if not is_url(path):
        return os.path.isdir(path)
    # of a file behind HTTP, the question would fetch all of it
    is_file = path.startswith(HTTP) and not is_page(path)
    return not is_file and bool(remote.ask(path, "isdir"))


def is_page(path: str) -> bool:
    """Return whether an address may be one of a page that lists files, which says nothing of these."""
    last = path.rpartition("::")[2]  # of a chain
    return last.startswith(HTTP) and not last.partition("?")[0].lower().endswith(ARCHIVES)


def local(path: str) -> Path:
    """Return a path on this machine; a file behind a URL is fetched unless the cache has it.

    Raises:
        OSError: if there is none, or it is not a regular file (reading a pipe would block).
        DataError: if it cannot be fetched.
    """
    if is_url(path):
        return remote.fetch(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("a folder, pipe or device, not a file")
    return Path(path)


def version(path: str) -> tuple[int | str, ...]:
    """Return what changes when a file is replaced: numbers, or what the store of an address has said."""
    if is_url(path):
        return (remote.sign_of(path),)
    state = os.stat(path)
    # the last of these times cannot be set
    return state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def version_of_local(path: str) -> tuple[int | str, ...]:
    """Return `version`; for a URL, numbers of the copy that was fetched, of which each use sets the
    other times.
    """
    state = local(path).stat()
    return (state.st_size, state.st_mtime_ns) if is_url(path) else version(path)


# errors that come from what a path is, and not from a disk or network that may work again
LASTING = {
    errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM,
    errno.ENAMETOOLONG, errno.EINVAL,
}  # fmt: skip
_failed_reads = 0


def may_pass(error: BaseException | None) -> bool:
    """Return whether an error, or one that it stands for, comes from a disk or network."""
    while error is not None:
        passes = getattr(error, "may_pass", False)
        if isinstance(error, OSError) and (
            passes or (error.errno is not None and error.errno not in LASTING)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def note_failure(error: OSError) -> None:
    """Count an error of reading that may pass, so that what it leaves out is not kept."""
    global _failed_reads
    _failed_reads += may_pass(error)


def failed_reads() -> int:
    """Return how many errors of reading this process has met that may pass."""
    return _failed_reads


def _remote_walk(root: str) -> list[str]:
    base = remote.filesystem(root)[1].rstrip("/")
    names = (name[len(base) + 1 :] for name in remote.ask(root, "find"))
    return [name for name in names if name and not is_hidden(name.split("/"))]
