"""Atomic writes: a file or folder appears under its name once it is completely written, and not at
all if anything goes wrong.

This is the only module that renames files into place.
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

from sfumato.platform import sync


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
def atomic_folder(target: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `target`, and rename it to `target` at the end.

    An existing folder of that name is replaced.

    Args:
        durable: see `atomic_path`; applies to every file directly in the folder.
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


def write_text(target: Path, text: str) -> None:
    """Replace a file's text atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def temporary_beside(target: Path) -> Path:
    """Return a hidden path in the same folder that no other process uses.

    A file left there by a crash is swept up as an orphan.
    """
    return target.with_name(f".tmp-{target.name}-{uuid.uuid4().hex[:8]}")


def commit(temporary: Path, target: Path, *, durable: bool = False) -> None:
    """Rename a finished file or folder into place."""
    if durable:
        sync(temporary)
    os.replace(temporary, target)
    if durable:
        sync(target.parent)
