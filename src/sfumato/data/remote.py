"""Files on remote storage, fetched on first use to a folder of limited size."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

from sfumato.errors import DataError, redact_secrets
from sfumato.platform import lock_file
from sfumato.process import watchdog
from sfumato.storage.atomic import atomic_path
from sfumato.storage.cache_folder import cache_folder

LOCK_POLL_S = 0.05
LOCK_DIGITS = 3  # of a file's name, by which it is locked: 4,096 locks for any number of files
ATTEMPTS, PAUSE_S = 6, 0.5  # of each file to fetch, and the first pause, which doubles
# HTTP statuses that do not concern one file alone: unauthorized, timeout, too early, too many requests
PASSING = (401, 408, 425, 429)
NEVER = threading.Event()
# what stores say of a file that another content changes; and times of change, of which some are coarse
SIGNS = ("ETag", "etag", "generation", "Content-MD5", "sha", "blob_id")
TIMES = (
    "mtime", "LastModified", "last_modified", "Last-Modified", "modified", "updated", "created",
)  # fmt: skip
_signs: dict[str, str] = {}  # of the addresses that were listed
_locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
if hasattr(os, "register_at_fork"):  # a thread of the parent may hold one
    os.register_at_fork(after_in_child=_locks.clear)


class FetchStopped(Exception):
    """A download was cancelled."""


class RefusedFile(OSError):
    """A file that a store refuses to give, which it may give another time."""

    may_pass = True


class Sign(NamedTuple):
    """What a store says of a file that another content changes, "" for nothing; and when it was changed,
    in ns, 0 where that is told by the text alone.
    """

    text: str
    newest_ns: int = 0


def limit_bytes() -> int:
    """Return how many bytes of remote files are kept: $SFUMATO_REMOTE_GIB, 20 GiB by default.

    Raises:
        DataError: if the variable is not a number.
    """
    setting = os.environ.get("SFUMATO_REMOTE_GIB") or "20"
    try:
        return int(float(setting) * 2**30)
    except (ValueError, OverflowError):
        raise DataError(
            f"{setting!r} is not a number of GiB",
            where="SFUMATO_REMOTE_GIB",
            hint="set it to one, such as 20",
        ) from None


@lru_cache(maxsize=256)
def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path in it."""
    protocol = url.partition(":")[0]
    try:
        from fsspec.core import url_to_fs

        result: tuple[Any, str] = url_to_fs(url)
        return result
    except (ImportError, ValueError) as error:
        raise DataError(
            f"nothing here can open {protocol}:// addresses ({error})",
            where=f"{protocol}://",
            hint="pip install 'sfumato[remote]', and the package that the message names (s3fs, "
            "gcsfs, adlfs, ...)",
        ) from None
    except Exception as error:
        raise _unreachable(url, error) from None


if hasattr(os, "register_at_fork"):  # file systems do not work in a fork of their process
    os.register_at_fork(after_in_child=filesystem.cache_clear)


def _unreachable(url: str, error: Exception) -> DataError:
    return DataError(
        f"cannot be reached: {type(error).__name__}: {str(error)[:200]}",
        where=url,
        hint="check the address, the network and your credentials for it",
    )


def ask(url: str, question: str) -> Any:
    """Call a method of a URL's file system; any exception becomes a DataError."""
    system, path = filesystem(url)
    try:
        return getattr(system, question)(path)
    except Exception as error:
        raise _unreachable(url, error) from None


def require_answer(url: str) -> None:
    """Raise DataError if a server does not answer; its file system reports a missing file instead."""
    system, path = filesystem(url)
    try:
        system.info(path)
    except FileNotFoundError as error:
        reason = error.__cause__
        if isinstance(reason, OSError) and not isinstance(reason, FileNotFoundError):
            raise _unreachable(url, reason) from None
    except Exception as error:
        raise _unreachable(url, error) from None


def signs_below(root: str, *, notes: bool = True) -> dict[str, Sign]:
    """Return what a store says now of each file below an address, by relative name ("" for that of a
    file).

    Args:
        notes: whether this process reads these versions from now on: copies of files that were fetched
            with other signs are then not used any more.

    Raises:
        DataError: if the store cannot be reached.
    """
    system, base = filesystem(root)
    try:
        system.invalidate_cache()
        facts = system.info(base)
        is_folder = facts["type"] == "directory"
        found = system.find(base, detail=True) if is_folder else {base: facts}
        begin = len(base.rstrip("/")) + 1
        below = {path[begin:]: _sign(facts) for path, facts in found.items()}
    except Exception as error:
        raise _unreachable(root, error) from None
    if notes:
        note_signs(
            {
                f"{root.rstrip('/')}/{name}" if name else root: sign.text
                for name, sign in below.items()
            }
        )
    return below


def _sign(facts: Mapping[str, Any]) -> Sign:
    """Return the sign of a file; a time counts only if it can be compared with the clock."""
    strong = [f"{name}={facts[name]}" for name in SIGNS if facts.get(name) is not None]
    size = f"size={facts.get('size')}"
    if strong:
        return Sign(" ".join([size, *strong]))
    times = {name: _time_ns(facts[name]) for name in TIMES if facts.get(name) is not None}
    if not times or None in times.values():
        return Sign("")
    newest = max(time_ns or 0 for time_ns in times.values())
    return Sign(" ".join([size, *(f"{name}={facts[name]}" for name in times)]), newest)


def _time_ns(value: Any) -> int | None:
    """Return a time as stores give it, in ns; None if it cannot be read."""
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        if isinstance(value, str):
            value = parsedate_to_datetime(value)
        return int(1e9 * (value.timestamp() if isinstance(value, datetime) else float(value)))
    return None


def note_signs(signs: Mapping[str, str]) -> None:
    """Read these versions of files from now on, by their addresses."""
    _signs.update(signs)


def known_signs() -> dict[str, str]:
    """Return the versions that this process reads, by address, for processes that it does not fork."""
    return dict(_signs)


def sign_of(url: str) -> str:
    """Return what its store said of a file when it was listed; "" if that is nothing."""
    return _signs.get(url, "")


def fetch(url: str, stop: threading.Event = NEVER) -> Path:
    """Return the copy of a file, which is fetched unless it is there.

    Args:
        stop: cancels the download when another thread sets it.

    Raises:
        FileNotFoundError: if the file does not exist.
        RefusedFile: if the store refuses to read this file.
        DataError: if all attempts to download it fail, or the disk is full.
        FetchStopped: if `stop` is set.
    """
    target = _target(url)
    if _is_there(target):
        return target
    with _fetching(target.name, stop):
        if _is_there(target):  # meanwhile
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(ATTEMPTS):
            if stop.is_set():
                raise FetchStopped
            try:
                _fetch_once(url, target, stop)
                return target
            except (DataError, FetchStopped):
                raise
            except Exception as error:  # each store has its own
                watchdog.beat()
                _raise_if_lasting(url, error)
                if attempt == ATTEMPTS - 1:
                    raise _unreachable(url, error) from None
                stop.wait(PAUSE_S * 2**attempt)
    raise AssertionError


def _raise_if_lasting(url: str, error: Exception) -> None:
    """Raise an error that must not be retried: a refused file, or a full disk."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise DataError(
            f"cannot be saved, since the disk is full: {error.strerror}",
            where=url,
            hint=f"free space in {cache_folder()}, name another folder by SFUMATO_CACHE, or let less be "
            "kept by SFUMATO_REMOTE_GIB",
        ) from None
    reason = redact_secrets(f"{url}: {error}")
    if isinstance(error, FileNotFoundError):
        raise FileNotFoundError(reason) from None
    status = _status_of(error)
    lasts = isinstance(status, int) and 400 <= status < 500
    if isinstance(error, PermissionError) or (lasts and status not in PASSING):
        raise RefusedFile(reason) from None


def _status_of(error: Exception) -> Any:
    """Return the status of an answer to an HTTP request, as the libraries of stores name it."""
    answer = getattr(error, "response", None)
    found = [getattr(error, "status", None), getattr(error, "code", None)]
    found += [getattr(answer, "status_code", None)]
    return next((status for status in found if isinstance(status, int)), None)


def touch(url: str) -> bool:
    """Return whether a file behind a URL is here; it then leaves the disk after those that are not used."""
    return _is_there(_target(url))


def _target(url: str) -> Path:
    sign = sign_of(url)
    name = f"{url}\0{sign}" if sign else url
    return cache_folder() / "remote" / hashlib.sha256(name.encode()).hexdigest()


def _is_there(target: Path) -> bool:
    """Return whether a file is there, and note that it is used now: others leave the disk before it."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(target, ns=(time.time_ns(), target.stat().st_mtime_ns))
        return True
    return False


@contextmanager
def _fetching(name: str, stop: threading.Event) -> Iterator[None]:
    """Wait while another thread or process fetches a file, or another one of the same lock."""
    lock = name[:LOCK_DIGITS]
    with _locks[lock], ExitStack() as stack:
        with contextlib.suppress(OSError):  # without locks, it may be fetched twice
            place = cache_folder() / "remote-locks" / lock
            place.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(place.open("w"))
            while not _locked(file):
                if stop.is_set():
                    raise FetchStopped
                watchdog.beat()
                time.sleep(LOCK_POLL_S)
        yield


def _locked(file: IO[str]) -> bool:
    try:
        lock_file(file)
    except BlockingIOError:
        return False
    return True


def _fetch_once(url: str, target: Path, stop: threading.Event) -> None:
    system, path = filesystem(url)
    with atomic_path(target) as temporary:
        with temporary.open("wb") as file, system.open(path, "rb") as remote:
            expected = getattr(remote, "size", None)
            while block := remote.read(1 << 20):
                if stop.is_set():
                    raise FetchStopped
                file.write(block)
                watchdog.beat()
        size = temporary.stat().st_size
        _is_there(temporary)  # the system's own clock is coarser
        if isinstance(expected, int) and size != expected:
            raise OSError(f"ended after {size:,} of {expected:,} bytes")
        _make_room(target.parent, size)


def _make_room(folder: Path, size: int) -> None:
    """Remove the least recently used files until `size` more bytes fit."""
    cached = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process makes room too
            if path.name[0] != ".":
                cached.append((path.stat().st_atime_ns, path.stat().st_size, path))
    excess = sum(entry[1] for entry in cached) + size - limit_bytes()
    for _, freed, path in sorted(cached):
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= freed
