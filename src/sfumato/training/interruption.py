"""Ctrl-C and SIGTERM asked for politely: finish the step, save, leave."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Self


class Interrupted(Exception):
    """Training was asked to stop by a signal."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        super().__init__(signal.Signals(number).name)


class Interruption:
    """Within `with Interruption() as asked:`, the first SIGINT or SIGTERM only sets a flag; the second one acts at once."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._remember)
            except ValueError:  # not the main thread: whoever owns it decides
                break
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        self._restore()

    def raise_if_asked(self) -> None:
        """Raise Interrupted if a signal came in."""
        if self._number is not None:
            raise Interrupted(self._number)
