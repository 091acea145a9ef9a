"""Errors of the system in plain words: files, disks, memory, names. Others are bugs of sfumato."""

from __future__ import annotations

import errno
import os

from sfumato.errors import SfumatoError
from sfumato.platform import is_out_of_memory

PERMISSIONS = "check the path and its permissions, or name another place (--out, --run)"
REASONS = {
    errno.EACCES: ("may not be read or written", PERMISSIONS),
    errno.EPERM: ("may not be read or written", PERMISSIONS),
    errno.EROFS: ("is on a read-only disk", "name another place (--out, --run)"),
    errno.ENOSPC: (
        "could not be written: the disk is full",
        "free some space, or name a place on another disk (--out, --run)",
    ),
    errno.EDQUOT: (
        "could not be written: your quota is used up",
        "free some space, or name another place (--out, --run)",
    ),
    errno.EFBIG: (
        "could not be written: the file is too large for this disk",
        "name a place on another disk (--out, --run)",
    ),
    errno.ENOENT: (
        "does not exist",
        "check the path; a relative one starts at the folder that the command is run in",
    ),
    errno.ENOTDIR: ("is a file where a folder is needed, or lies below one", "name a folder"),
    errno.EISDIR: ("is a folder where a file is needed", "name a file"),
    errno.EEXIST: ("exists already", "name another place, or remove it"),
    errno.ENAMETOOLONG: ("has a name too long for this disk", "use a shorter one"),
    errno.ELOOP: ("is a symbolic link loop", "name the file that it should point to"),
    errno.EMFILE: (
        "could not be opened: too many files are open",
        "raise the limit (ulimit -n 4096), or lower data.workers",
    ),
    errno.EIO: (
        "could not be read or written: the disk reports an error",
        "check the disk and its connection",
    ),
    errno.ESTALE: (
        "is on a network disk that is no longer connected",
        "connect it again, and repeat the command",
    ),
    errno.EINVAL: ("has a name that this system does not allow", "use another one"),
}
MEMORY = "train with a smaller batch_size or with micro_batch, make fewer or smaller images, or close other programs"


def in_words(error: BaseException) -> SfumatoError | None:
    """Return the error in words that a user can act on, or None if the system did not cause it.

    In that case it is a bug of sfumato.
    """
    if isinstance(error, OSError):
        return _refused(error)
    if is_out_of_memory(error):
        first = next(iter(str(error).splitlines()), "")
        return SfumatoError(f"not enough memory{': ' if first else ''}{first}", hint=MEMORY)
    if isinstance(error, UnicodeError):
        return SfumatoError(
            f"a name or text is not UTF-8: {error}",
            hint="rename the file, or save the text as UTF-8",
        )
    return None


def _refused(error: OSError) -> SfumatoError:
    names = [
        os.fsdecode(name)
        for name in (error.filename, error.filename2)
        if isinstance(name, str | bytes | os.PathLike)
    ]
    what, hint = REASONS.get(
        error.errno or 0, (f"operating system error: {error.strerror or error}", PERMISSIONS)
    )
    return SfumatoError(
        what if names or error.errno not in REASONS else f"a file {what}",
        where=" -> ".join(names),
        hint=hint,
    )
