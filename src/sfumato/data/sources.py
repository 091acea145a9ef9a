"""Where pictures come from: a source lists its entries; nothing is decoded here."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from sfumato.data.decoding import MAX_BYTES, SUFFIXES
from sfumato.errors import DataError


@dataclass(frozen=True)
class Entry:
    """One picture: its name for people, its category if there are any, and its encoded bytes or the file that holds them."""

    name: str
    category: str | None
    location: Path | bytes

    def read(self) -> bytes:
        """The encoded bytes, or as many as it takes for `decode` to say that they are too many.

        Raises:
            OSError: if the file is gone.
        """
        if isinstance(self.location, bytes):
            return self.location
        with self.location.open("rb") as file:
            return file.read(MAX_BYTES + 1)


class Source(Protocol):
    """A frozen configuration that can list what it holds."""

    def entries(self) -> list[Entry]:
        """All pictures, in an order that does not depend on the machine."""
        ...


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 in 17 grays, ten categories; they come with the package."""

    def entries(self) -> list[Entry]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        return [
            Entry(f"digit-{index:04d}", str(label), _png(image))
            for index, (image, label) in enumerate(zip(digits.images, digits.target, strict=True))
        ]


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class Folder:
    """A folder of pictures: flat, or one sub-folder for each category (pictures deeper down belong to the top-most one)."""

    path: str

    def entries(self) -> list[Entry]:
        root = Path(self.path)
        if not root.exists():
            raise DataError("no such folder", where=self.path, mend="check the path; it is relative to where you run sfumato")
        if not root.is_dir():
            raise DataError("is a file, not a folder", where=self.path, mend="name the folder that holds the pictures")
        files = sorted(_pictures(root), key=lambda file: file.as_posix())
        if not files:
            raise DataError(
                f"holds no pictures ({', '.join(SUFFIXES)})", where=self.path, mend="put pictures in it, or name another folder"
            )
        nested = any(len(file.parts) > 1 for file in files)
        return [Entry(_legible(file.as_posix()), _category(file) if nested else None, root / file) for file in files]


def _category(file: Path) -> str:
    return _legible(file.parts[0]) if len(file.parts) > 1 else ""


def _legible(name: str) -> str:
    """A name that can be written as UTF-8; file systems allow others."""
    return name.encode(errors="backslashreplace").decode()


def _pictures(root: Path) -> list[Path]:
    """Picture files below `root`, relative to it; hidden ones, pipes, devices and what lies behind linked folders are left out."""
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        pictures = (Path(folder, name) for name in names if name.lower().endswith(SUFFIXES) and not name.startswith("."))
        found.extend(path.relative_to(root) for path in pictures if path.is_file() or not path.exists())
    return found


SourceConfig = Digits | Folder
