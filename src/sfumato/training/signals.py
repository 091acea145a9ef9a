"""Graceful stops by Ctrl-C and SIGTERM: finish the step, save, exit."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Self


class Interrupted(Exception):
    """Raised when a signal has asked training to stop."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        super().__init__(signal.Signals(number).name)


class Interruption:
    """A context manager in which the first SIGINT or SIGTERM only sets a flag.

    The second one acts at once.

    A signal to a whole process group also ends the processes that read data ahead. From then on
    their end is not an error, so that the step is finished and saved.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._previous: dict[int, object] = {}
        self._of_children: object = None

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._remember)
            except ValueError:  # not the main thread: whoever owns it decides
                break
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()
        if self._of_children is not None:
            signal.signal(signal.SIGCHLD, self._of_children)  # type: ignore[arg-type]

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        self._restore()
        if hasattr(signal, "SIGCHLD"):  # torch's handler raises in the middle of a step
            self._of_children = signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def raise_if_requested(self) -> None:
        """Raise Interrupted if a signal was received."""
        if self._number is not None:
            raise Interrupted(self._number)
