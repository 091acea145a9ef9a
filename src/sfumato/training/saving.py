"""Checkpoints written beside training: the state is copied, and a thread writes the copy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sfumato.errors import CheckpointError
from sfumato.platform import available_memory

Groups = Mapping[str, Mapping[str, Tensor]]
ROOM = 2  # times the size of a copy that must be free for it


class Saver:
    """Writes one checkpoint at a time, in a thread where there is memory for a copy of it."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def begin(self, write: Callable[[Groups], object], tensors: Groups) -> None:
        """Write a copy of `tensors` as they are now, once the write before has ended.

        Raises:
            CheckpointError, OSError: if the write before failed, or this one did where it could
                not be done beside training.
        """
        self.wait()
        size = sum(value.nbytes for group in tensors.values() for value in group.values())
        if available_memory() < ROOM * size:
            write(tensors)
            return
        copies = {name: copied(group) for name, group in tensors.items()}
        self._thread = threading.Thread(
            target=self._run, args=(write, copies), name="checkpoint", daemon=False
        )
        self._thread.start()

    def _run(self, write: Callable[[Groups], object], tensors: Groups) -> None:
        try:
            write(tensors)
        except (CheckpointError, OSError) as error:
            self._error = error

    def raise_if_failed(self) -> None:
        """Raise what went wrong in a write that has ended, once."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the write that is going on.

        Raises:
            CheckpointError, OSError: if it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return copies of tensors on the CPU; the values that share storage share it in the copies."""
    copies: dict[tuple[int, ...], Tensor] = {}
    result = {}
    for name, tensor in tensors.items():
        value = tensor.detach()
        key = (value.data_ptr(), *value.shape, *value.stride()) if value.numel() else (id(value),)
        if key not in copies:
            copies[key] = value.to("cpu", copy=True)
        result[name] = copies[key]
    return result
