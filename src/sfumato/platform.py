"""What differs between operating systems; everything else runs anywhere that Python does.

Linux and macOS are supported. On Windows the package imports, checks data and samples; training
needs the file locks of Linux and macOS (use WSL). Windows is simulated by tests, not run.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import signal
import sys
import threading
import zlib
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None  # type: ignore[assignment]

PR_SET_PDEATHSIG = 1  # of prctl.h
# limit and use of a container's memory: of cgroups 2 and 1
CONTAINER_MEMORY = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
UNLIMITED = 1e18
HAS_FILE_LOCKS = fcntl is not None
_READING = threading.Lock()


def lock_file(file: IO[str]) -> None:
    """Take the exclusive lock of an open file; it goes when this process closes the file or ends.

    Processes that it forks do not inherit the lock, so that those that read data ahead do not hold
    it after the main process was killed. Within one process it does not exclude a second opening.

    Raises:
        BlockingIOError: if another process holds it.
        OSError: if the system or the file system has no locks.
    """
    if fcntl is None:
        raise OSError("this system has no file locks")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except PermissionError as error:  # EACCES, as some systems say
        raise BlockingIOError(error.errno, error.strerror) from None


@lru_cache
def host_id() -> str:
    """Return eight hexadecimal digits that stand for this machine, and for a container on it."""
    try:
        processes = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not Linux
        processes = 0
    return f"{zlib.crc32(f'{platform.node()} {processes}'.encode()):08x}"


def is_alive(pid: int) -> bool:
    """Return whether a process of this machine runs; True if that cannot be told."""
    if os.name == "nt":
        return True
    with contextlib.suppress(OSError, IndexError):  # one that has ended, and waits for its parent
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


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


def available_memory() -> int:
    """Return how many bytes of memory this process can still take, also in a container with a limit;
    where that is unknown, those of the machine.
    """
    found = [_number_in(limit) - _number_in(used) for limit, used in CONTAINER_MEMORY]
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/meminfo") as lines:
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    known = [size for size in found if size < UNLIMITED]  # neither infinite nor NaN
    if known:
        return max(0, int(min(known)))
    return total_memory() if hasattr(os, "sysconf") else int(_psutil().virtual_memory().available)


def _number_in(path: str) -> float:
    """Return the number in a file of the system; infinity if there is none, or it says "max"."""
    try:
        with open(path) as file:
            return float(file.read())
    except (OSError, ValueError):
        return math.inf


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


def die_with_parent(_: object = None) -> None:
    """Let the system kill this process when its parent ends, on Linux.

    A process that hangs in a read would otherwise stay for ever after its parent was killed.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there is not enough memory, of the machine or of a GPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _psutil() -> Any:
    """Import psutil, which is installed on Windows only."""
    import psutil

    return psutil
