"""Files of a run that may be a stranger's: they are limited before they are parsed, and anything that
is not as it should be is one CheckpointError.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sfumato.errors import CheckpointError

MAX_JSON_BYTES = 64 << 20
MAX_HEAD_BYTES = 16 << 20  # of a safetensors file: some 100,000 tensors
MAX_SIDE = 1 << 16  # pixels
MAX_CHANNELS = 1 << 10


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: if it cannot be read, is longer than MAX_JSON_BYTES, or is no JSON object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"is longer than {MAX_JSON_BYTES >> 20} MiB, and is not read", where=str(path)
            )
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"unreadable ({' '.join(str(error).split())[:200]})", where=str(path)
        ) from None


def read_tensors(path: Path, *, finite: bool = True) -> dict[str, Tensor]:
    """Read a safetensors file.

    Args:
        finite: whether values that are not finite are refused.
    Raises:
        CheckpointError: if it cannot be read, its head is longer than MAX_HEAD_BYTES, or a value is
            not finite.
    """
    try:
        with path.open("rb") as file:
            head = file.read(8)
        if len(head) == 8 and struct.unpack("<Q", head)[0] > MAX_HEAD_BYTES:
            raise CheckpointError(
                f"cannot be read: it lists its tensors in more than {MAX_HEAD_BYTES >> 20} MiB",
                where=str(path),
            )
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(path)) from None
    if finite and (name := first_not_finite(tensors)) is not None:
        raise CheckpointError(f"{name} has values that are not finite", where=str(path))
    return tensors


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of a tensor that has infinite values or NaN; None if all are finite."""
    floats = {name: value for name, value in tensors.items() if value.is_floating_point()}
    # a sum is not finite if one of its terms is not: one pass, without a mask of each tensor; where
    # the sum of finite values overflows, the values themselves decide
    for name, value in floats.items():
        if not torch.isfinite(value.sum()) and not bool(torch.isfinite(value).all()):
            return name
    return None


def image_shape(state: Mapping[str, Any], *, where: Path) -> tuple[int, int, int]:
    """Return the (C, H, W) that a checkpoint's model was trained on.

    Raises:
        CheckpointError: if the checkpoint has none, or one that no image has.
    """
    match state.get("image_shape"):
        case [int(channels), int(height), int(width)] if (
            0 < channels <= MAX_CHANNELS and 0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE
        ):
            return channels, height, width
    raise CheckpointError(
        f"image_shape = {str(state.get('image_shape'))[:80]} is not (channels, height, width)",
        where=str(where),
        hint="copy the run again",
    )
