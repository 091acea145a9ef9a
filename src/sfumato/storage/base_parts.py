"""The identity of what a run is based on and does not hold: hashes of tensors, not of files, so that
a base that was saved again is the same base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sfumato.errors import CheckpointError
from sfumato.storage.weight_files import unreadable

PARTS = "base_parts"  # in a checkpoint's state
SETTINGS = "scheduler"  # which a run has copied into its own configuration


def weights_digest(files: Iterable[Path], *, rename: Callable[[str], str] = str) -> str:
    """Return a hash of the names, shapes and values of tensors, hexadecimal.

    It does not depend on how they are spread over files, on other content of the files, or on the
    precision of floating-point numbers: a tensor that was stored exactly in another one is the
    same. One tensor is read at a time.

    Args:
        rename: of a tensor to the name by which it counts; "" leaves it out. Equal tensors of the
            same name count once.
    Raises:
        CheckpointError: naming a file that cannot be read.
    """
    rows = set()
    for file in files:
        try:
            with safe_open(file, framework="pt") as content:
                names: list[str] = list(content.keys())
                for name in names:
                    if known := rename(name):
                        rows.add(f"{known} {_tensor_digest(content.get_tensor(name))}")
        except (SafetensorError, OSError) as error:
            raise unreadable(file, error) from None
    return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()


def _tensor_digest(tensor: Tensor) -> str:
    values = tensor.float() if tensor.is_floating_point() else tensor
    data = values.contiguous().flatten().view(torch.uint8).numpy().data
    return f"{tuple(values.shape)} {hashlib.sha256(data).hexdigest()}"


def require_same_parts(
    before: Mapping[str, str], now: Mapping[str, str], *, where: str
) -> list[str]:
    """Return warnings about parts of the base that have changed and do not matter to the run.

    Parts that only one of the two has are not compared: older runs recorded none.

    Args:
        before: hashes by part, of the run; now: those of the base as it is.
    Raises:
        CheckpointError: naming the part that has changed and does matter.
    """
    changed = [name for name in before if name in now and before[name] != now[name]]
    for name in changed:
        if name != SETTINGS:
            raise CheckpointError(
                f"the part {name} of the base is not the one that this run was trained with: the "
                f"hash of its tensors is {now[name][:12]}, and was {before[name][:12]}",
                where=where,
                hint="put the base back as it was, or train a new run",
            )
    return [
        f"the {name} of the base has changed; the run keeps the settings that it began with"
        for name in changed
    ]
