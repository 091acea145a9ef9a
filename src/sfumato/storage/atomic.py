"""Atomic writes: a file or folder appears under its name once it is completely written, and not at
all if anything goes wrong.

This is the only module that renames files into place.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sfumato.platform import host_id, is_alive, sync

ORPHAN = re.compile(r"\.tmp-.*-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}")
OLD_S = 86_400  # age at which a temporary file of another machine counts as abandoned


@contextmanager
def atomic_path(target: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield the path of a temporary file beside `target`, and rename it to `target` at the end.

    Args:
        durable: whether the file must survive a power loss; it is synced to the disk before it is
            renamed.
    """
    temporary = temporary_beside(target)
    try:
        yield temporary
        commit(temporary, target, durable=durable)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def atomic_file(target: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that replaces `target` at the end; its folder is created if missing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as temporary, temporary.open("wb") as file:
        yield file


@contextmanager
def atomic_folder(target: Path, *, durable: bool = False, replaces: bool = True) -> Iterator[Path]:
    """Yield a temporary folder beside `target`, and rename it to `target` at the end.

    Args:
        replaces: whether a folder of that name is replaced; if not, it is an OSError.
        durable: see `atomic_path`; applies to every file directly in the folder.
    """
    temporary = temporary_beside(target)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if durable:
            for file in temporary.iterdir():
                if file.is_file():
                    sync(file)
        if replaces:
            shutil.rmtree(target, ignore_errors=True)
        commit(temporary, target, durable=durable)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def atomic_output(target: Path) -> Iterator[Path]:
    """Yield a path for a file or folder named as `target`, and rename what is there to `target` at
    the end.

    It lies in a temporary folder beside `target`, and does not exist yet. Files that are written
    beside it, such as a description, are moved with it.
    """
    folder = temporary_beside(target)
    created = [path for path in folder.parents if not path.exists()]
    try:
        folder.mkdir(parents=True)
        yield folder / target.name
        for path in folder.iterdir():
            if path.name != target.name:
                commit(path, target.with_name(path.name))
        commit(folder / target.name, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for path in created:
            with contextlib.suppress(OSError):  # the target is in it
                path.rmdir()


def write_text(target: Path, text: str, *, durable: bool = False) -> None:
    """Replace a file's text atomically; for `durable`, see `atomic_path`."""
    with atomic_path(target, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def temporary_beside(target: Path) -> Path:
    """Return a hidden path in the same folder that no other process uses.

    Its name says which process of which machine writes there, so that `sweep` can remove what a
    killed one left.
    """
    own = f"{host_id()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return target.with_name(f".tmp-{target.name[:80]}-{own}")


def sweep(folder: Path, *, held: bool = False) -> int:
    """Remove what killed processes were writing in a folder; return how many files and folders.

    What a process that is alive writes is left alone, and for a day also what another machine
    began, whose processes cannot be seen from here.

    Args:
        held: whether no other process writes here or below, so that all of it is removed.
    """
    count = 0
    for path in list(folder.rglob(".tmp-*") if held else folder.glob(".tmp-*")):
        if held or _is_orphan(path):
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            count += 1
    return count


def _is_orphan(path: Path) -> bool:
    writer = ORPHAN.fullmatch(path.name)
    if writer is not None and writer["host"] == host_id():
        return not is_alive(int(writer["pid"]))
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime > (0 if writer is None else OLD_S)
    return False


def commit(temporary: Path, target: Path, *, durable: bool = False) -> None:
    """Rename a finished file or folder into place."""
    if durable:
        sync(temporary)
    os.replace(temporary, target)
    if durable:
        sync(target.parent)
