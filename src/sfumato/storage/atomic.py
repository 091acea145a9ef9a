"""Atomic writes: a file or folder appears under its name when all of it is written, and not at all
if anything goes wrong.

The only module that renames files into place.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_path(target: Path, *, durable: bool = False) -> Iterator[Path]:
    """The path of a temporary file beside `target`, which replaces it at the end.

    Args:
        durable: whether it must survive a loss of power; synced to the disk before it gets its
            name.
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
    """A file to write to that replaces `target` at the end; its folder is made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as temporary, temporary.open("wb") as file:
        yield file


@contextmanager
def atomic_folder(target: Path, *, durable: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target`, which gets its name at the end; a folder of that name is
    replaced.

    Args:
        durable: see `atomic_path`; holds for all files in it.
    """
    temporary = temporary_beside(target)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if durable:
            for file in temporary.iterdir():
                sync(file)
        shutil.rmtree(target, ignore_errors=True)
        commit(temporary, target, durable=durable)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_text(target: Path, text: str) -> None:
    """Replace a file's text in one go."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def temporary_beside(target: Path) -> Path:
    """A path in the same folder that no other process uses; hidden, and swept up as an orphan after
    a crash.
    """
    return target.with_name(f".tmp-{target.name}-{uuid.uuid4().hex[:8]}")


def commit(temporary: Path, target: Path, *, durable: bool = False) -> None:
    """Rename a finished file or folder into place."""
    if durable:
        sync(temporary)
    os.replace(temporary, target)
    if durable:
        sync(target.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
