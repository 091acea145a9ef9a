"""The folders that `sfumato sample` writes to.

A folder holds the images of one request. The same request completes them, and no other replaces
them.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato import __version__
from sfumato.errors import OutputError
from sfumato.generation.options import SamplingOptions
from sfumato.generation.pipeline import Pipeline
from sfumato.generation.request import SampleRequest, keeps_a_part
from sfumato.observability.image_formats import (
    FORMATS,
    SETTINGS,
    ImageFormat,
    PixelEncoding,
    settings_of,
)

GRID, TRAJECTORY = "grid.png", "trajectory.png"
NUMBERED = re.compile(rf"(\d{{5,}})\.(?:{'|'.join(FORMATS)})")
MOST_FOLDERS = 10_000
# options that decide nothing in an image
# `like` affects the weights, which are counted themselves
WITHOUT_EFFECT = ("out", "folder", "trajectory", "compile", "as_json", "format", "like", "procs")
BLOCK = 4096  # bytes: a full disk may still create a file, but not fill a block of it


@contextmanager
def writable(folder: Path, *, fresh: bool = False) -> Iterator[None]:
    """Create `folder` and try to write a file in it, before any work.

    If an error leaves the folder empty, it is removed again.

    Args:
        fresh: whether it was just created for this.
    Raises:
        OutputError: if it cannot be written to.
    """
    created = [
        path
        for path in (folder, *folder.parents)
        if not path.exists() or (fresh and path == folder)
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".partial") as file:
            file.write(bytes(BLOCK))
            file.flush()
    except OSError as error:
        _remove(created)
        raise unwritten(folder, error) from None
    try:
        yield
    except BaseException:
        _remove(created)
        raise


def _remove(folders: list[Path]) -> None:
    """Remove those of the folders that are empty."""
    for path in folders:
        with suppress(OSError):
            path.rmdir()


def unwritten(folder: Path, error: OSError, more: str = "") -> OutputError:
    """Return the error for a folder that cannot be written to."""
    return OutputError(
        f"cannot be written to: {error.strerror or error}{more}",
        where=str(folder),
        hint="name another folder with --out, or free space and set permissions there",
    )


def recorded_settings(
    options: Mapping[str, Any],
    pipeline: Pipeline,
    request: SampleRequest,
    settings: SamplingOptions,
    kind: str,
) -> dict[str, Any]:
    """Return the settings that the images carry: every option that affects them.

    Of a file, they carry only the name. "request" identifies all that decides what image i is: the
    options, the weights, and the content of the files.
    """
    affecting = {name: value for name, value in options.items() if name not in WITHOUT_EFFECT}
    files = {
        name: file_id(value)
        for name, value in affecting.items()
        if isinstance(value, Path) and name != "run"
    }
    resolved = settings.resolve(pipeline.sampling, inpainting=keeps_a_part(request.mask))
    recorded = {
        **affecting,
        **{name: Path(options[name]).name for name in files},
        "run": options["run"].name,
        **resolved.settings(),
        "format": kind,
    }
    if pipeline.values.value_range is not None:
        recorded |= {
            "value_range": pipeline.values.value_range,
            "in_values_of_the_source": FORMATS[kind].holds_source_values(pipeline.values),
        }
    interpolates = options["to_prompt"] is not None or options["to_seed"] is not None
    deciding = {
        name: value
        for name, value in recorded.items()
        if name != "run" and (name != "num" or interpolates)
    }
    model = weights_id(pipeline.model, pipeline.autoencoder)
    parts = {"files": files, "model": model, "of": repr(pipeline.sampling), "by": __version__}
    return recorded | {"request": request_id(deciding | parts)}


def recorded_loras(loras: Sequence[tuple[Path, float]]) -> list[dict[str, Any]] | None:
    """Return what images say of the LoRA files that made them; None without one."""
    return [
        {"file": path.name, "strength": strength, "sha256": folder_id(path)}
        for path, strength in loras
    ] or None


def recorded_file(path: Path | None) -> dict[str, Any] | None:
    """Return what images say of a file that changed the model that made them; None without one."""
    return None if path is None else {"file": path.name, "sha256": folder_id(path)}


def folder_id(path: Path) -> str:
    """Hash the content of a file, or of the files in a folder and below."""
    if path.is_file():
        return file_id(path)
    parts = [f"{file.relative_to(path)} {file_id(file)}" for file in sorted(path.rglob("*.*"))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def request_id(deciding: Mapping[str, Any]) -> str:
    """Return a name for all that decides what image i is; equal requests have equal names."""
    return hashlib.sha256(json.dumps(deciding, sort_keys=True, default=repr).encode()).hexdigest()[
        :16
    ]


def weights_id(*modules: nn.Module) -> str:
    """Hash all weights of the modules."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def file_id(path: Path) -> str:
    """Hash a file's content; return "" for an unreadable file, which is refused elsewhere."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError:
        return ""


@dataclass(frozen=True)
class Generated:
    """The files of one request in a folder.

    Attributes:
        folder: may hold other files, which are left alone.
        kind: a name in `FORMATS`, and the files' ending.
        values: what the images' values stand for.
        settings: written into every file; "request" names the request.
        fresh: whether the folder was made for this request just now.
    """

    folder: Path
    kind: str
    values: PixelEncoding
    settings: Mapping[str, Any]
    fresh: bool = False

    @property
    def form(self) -> ImageFormat:
        """The format in which images are written."""
        return FORMATS[self.kind]

    def path(self, number: int) -> Path:
        """Return the path of image `number`."""
        return self.folder / f"{number:05d}.{self.kind}"

    def write(self, number: int, image: Tensor) -> Path:
        """Write one image (C, H, W) in [0, 1], whole or not at all."""
        return self.form.write(
            image, self.path(number), self.values, {**self.settings, "index": number}
        )

    def _same(self, path: Path) -> bool:
        """Return whether a file carries the name of this request."""
        settings = _json(path) if path.name == SETTINGS else settings_of(path)
        return isinstance(settings, dict) and settings.get("request") == self.settings["request"]

    @cached_property
    def _contents(self) -> tuple[frozenset[int], tuple[str, ...]]:
        names = sorted(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else []
        mine: set[int] = set()
        others: list[str] = []
        for name in names:
            numbered = NUMBERED.fullmatch(name)
            if numbered is None and name not in (GRID, TRAJECTORY, SETTINGS):
                continue
            if not self._same(self.folder / name):
                others.append(name)
            elif numbered is not None and name.endswith(f".{self.kind}"):
                mine.add(int(numbered[1]))
        return frozenset(mine), tuple(others)

    @property
    def there(self) -> frozenset[int]:
        """Numbers of the images of this request that the folder holds."""
        return self._contents[0]

    @property
    def others(self) -> tuple[str, ...]:
        """Names of files that look like images of a request but are not of this one."""
        return self._contents[1]

    def in_free_folder(self) -> Generated:
        """Return the request with the first of FOLDER, FOLDER-2, FOLDER-3, ... that it can use.

        It can use a folder that holds images of this request only, or that can be created. An empty
        folder belongs to a job that has just begun, so that two jobs never share one.

        Raises:
            OutputError: if all are taken.
        """
        for number in range(1, MOST_FOLDERS):
            name = self.folder.name if number == 1 else f"{self.folder.name}-{number}"
            tried = replace(self, folder=self.folder.with_name(name))
            with suppress(FileExistsError):
                tried.folder.mkdir()
                return replace(tried, fresh=True)
            if tried.there and not tried.others:
                return tried
        raise OutputError(
            "holds too many requests of one seed",
            where=str(self.folder.parent),
            hint="name a folder with --out",
        )

    def require_unharmed(self, written: Collection[str]) -> None:
        """Raise OutputError if a file that will be `written` exists and is not of this request."""
        harmed = [name for name in self.others if name in written]
        if harmed:
            shown = ", ".join(harmed[:3]) + (", ..." if len(harmed) > 3 else "")
            raise OutputError(
                f"holds {len(harmed)} file(s) that would be replaced and were not made by this "
                f"request: {shown}",
                where=str(self.folder),
                hint="name another folder with --out, or move them away",
            )

    def notes(self, num: int, say: Callable[[str], None]) -> None:
        """Say what the folder holds besides the `num` images of this job."""
        beyond = sum(number >= num for number in self.there)
        if beyond:
            say(
                f"note: {self.folder} also holds {beyond} more image(s) of the same request, "
                "made with a larger --num"
            )
        strange = sum(bool(NUMBERED.fullmatch(name)) for name in self.others)
        if strange:
            say(
                f"note: {self.folder} also holds {strange} numbered image(s) that this request "
                "did not make"
            )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
