"""What differs between operating systems; everything else runs anywhere that Python does.

Linux and macOS are supported. On Windows the package imports, checks data and samples; training
needs the file locks of Linux and macOS (use WSL). Windows is simulated by tests, not run.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import IO, Any

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None  # type: ignore[assignment]

HAS_FILE_LOCKS = fcntl is not None
_READING = threading.Lock()


def lock_file(file: IO[str]) -> None:
    """Take the exclusive lock of an open file; it goes when the file is closed or the process ends.

    Raises:
        BlockingIOError: if another process holds it.
        OSError: if the file system has no locks.
    """
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Read up to `size` bytes at `offset`, from any number of threads at once."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    with _READING:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, size)


def total_memory() -> int:
    """Return the machine's memory in bytes."""
    if not hasattr(os, "sysconf"):
        return int(_psutil().virtual_memory().total)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory() -> int:
    """Return the most memory that this process has held, in bytes."""
    if resource is None:
        return int(_psutil().Process().memory_info().peak_wset)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def sync(path: os.PathLike[str]) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name == "nt":
        return  # neither a folder nor a file opened for reading can be synced there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _psutil() -> Any:
    """Import psutil, which is installed on Windows only."""
    import psutil

    return psutil
