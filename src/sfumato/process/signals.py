"""Signals: SIGINT, SIGTERM and SIGHUP ask the process to stop at the next safe moment, SIGUSR1 to save
and go on.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from sfumato.process import watchdog

STOP = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
HANGUP, SAVE = getattr(signal, "SIGHUP", None), getattr(signal, "SIGUSR1", None)  # not on Windows
# within which a second signal counts as the first: programs that start others often forward what a
# whole group of processes has received already
SAME_S = 0.5


class Interrupted(Exception):
    """Raised when a signal has asked the process to stop.

    Attributes:
        is_said: whether the person was told what was saved.
    """

    def __init__(self, number: int) -> None:
        self.exit_code, self.is_said = 128 + number, False
        super().__init__(signal.Signals(number).name)


class _Handler:
    """The signals received since `handled` began."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.save = False
        self.agree: Callable[[int], int] | None = None
        self._at = 0.0
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        for number in (*STOP, *([] if SAVE is None else [SAVE])):
            if number == HANGUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup asks for that
            try:
                self._previous[number] = signal.signal(number, self._receive)
            except ValueError:  # not the main thread: whoever owns it decides
                break

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == SAVE:
            self.save = True
        elif self.number is None:
            self.number, self._at = number, time.monotonic()
        elif time.monotonic() - self._at > SAME_S:
            self.restore()
            os.kill(os.getpid(), number)


_active: _Handler | None = None


@contextmanager
def handled() -> Iterator[None]:
    """Let the first SIGINT, SIGTERM or SIGHUP only set a flag, for `poll`; the second acts at once.

    Nested uses share the outermost one's signals.
    """
    global _active
    if _active is not None:
        yield
        return
    _active = handler = _Handler()
    handler.install()
    try:
        yield
    finally:
        handler.restore()
        _active = None


def ignore_save_requests() -> None:
    """Let SIGUSR1 do nothing where there is nothing to save yet; by default it ends the process."""
    if SAVE is not None:
        with suppress(ValueError):  # not the main thread
            signal.signal(SAVE, signal.SIG_IGN)


@contextmanager
def agreed_by(agree: Callable[[int], int] | None) -> Iterator[None]:
    """Let several processes stop at the same place: they all call `poll` equally often.

    Args:
        agree: returns the largest of the numbers that the processes call it with: those of their
            signals, 0 without one. None where this process stops alone.
    """
    handler = _active
    if handler is None:
        yield
        return
    before, handler.agree = handler.agree, agree
    try:
        yield
    finally:
        handler.agree = before


def received() -> int:
    """Return the number of the signal that has asked this process to stop; 0 without one."""
    return 0 if _active is None else _active.number or 0


def obey(number: int) -> None:
    """Say that the work goes on, and raise Interrupted if the processes have agreed on a signal."""
    watchdog.beat()
    if number:
        raise Interrupted(number)


def poll() -> None:
    """Say that the work goes on, and raise Interrupted if a signal has asked it to stop, here or in
    a process that this one has agreed to stop with.
    """
    agree = None if _active is None else _active.agree
    obey(received() if agree is None else agree(received()))


def raise_if_requested() -> None:
    """Raise Interrupted if a signal has asked the process to stop; says nothing to the watchdog.

    A process that stops together with others only does so where they agree.
    """
    if _active is not None and _active.agree is None and (number := received()):
        raise Interrupted(number)


def is_stop_requested() -> bool:
    """Return whether a signal has asked the process to stop."""
    return _active is not None and _active.number is not None


def acknowledge() -> None:
    """Forget a request to stop, once what it was meant for has stopped."""
    if _active is not None:
        _active.number = None


def take_save_request() -> bool:
    """Return whether SIGUSR1 was received since the last call."""
    if _active is None or not _active.save:
        return False
    _active.save = False
    return True
