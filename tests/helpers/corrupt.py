"""What becomes of bytes that may or may not be an image, and copies of model folders with one fault
each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from sfumato.data.decoding import Decoded, PixelFormat, RejectedImage, decode


def pixels_or_reason(data: bytes, form: PixelFormat) -> Decoded | str:
    """The image, decoded as when a set is indexed, or why it is refused; any other error is a
    failure.
    """
    try:
        return decode(data, form, identify=True)
    except RejectedImage as rejected:
        return str(rejected)


def assert_pixels_or_reason(data: bytes, form: PixelFormat) -> bool:
    """Fails unless `data` are pixels of the format, or refused with a reason of a sentence; says
    which.
    """
    found = pixels_or_reason(data, form)
    if isinstance(found, str):
        assert 0 < len(found) < 300
        return False
    assert found.pixels.shape == (form.channels, *form.shapes[found.shape])
    assert found.pixels.dtype == (np.uint8 if form.bits == 8 else np.uint16)
    assert all(isinstance(note, str) for note in found.notes)
    assert len(found.id) == 32
    assert min(found.size) >= 1
    return True


def rename(model: Path, name: str, ending: str) -> None:
    """Give a file of weights another ending."""
    (model / name).rename((model / name).with_suffix(ending))


def replace_bytes(model: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Write a file anew from its bytes."""
    (model / name).write_bytes(change((model / name).read_bytes()))


def edit_json(model: Path, name: str, **values: object) -> None:
    """Set keys of a JSON file."""
    content = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps(content | values))


def edit_tensor(
    model: Path, name: str, tensor: str, change: Callable[[torch.Tensor], torch.Tensor | None]
) -> None:
    """Change one tensor of a file of weights, or leave it out if the change is None."""
    tensors = load_file(model / name)
    changed = change(tensors.pop(tensor))
    if changed is not None:
        tensors[tensor] = changed.contiguous()
    save_file(tensors, model / name, metadata={"format": "pt"})


def snapshot(folder: Path) -> dict[str, str]:
    """A hash of every file below a folder, and the folders themselves."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else ""
        for path in sorted(folder.rglob("*"))
    }
