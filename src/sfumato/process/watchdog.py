"""A watchdog: where nothing has moved for too long, all stacks are written and the process ends."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: worth trying again
LAST_S = 60.0  # in which what is whole is saved, before the process ends in any case
_last_beat = 0.0


def beat() -> None:
    """Say that the work goes on."""
    global _last_beat
    _last_beat = monotonic()


class Watchdog:
    """What happens when nothing has moved for too long.

    Attributes:
        file: that the stacks of all threads are written to, besides standard error.
        on_stall: called with a message before the process ends, in the watchdog's thread: the main
            thread hangs.
    """

    file: Path | None
    on_stall: Callable[[str], object]

    def __init__(self, seconds: float) -> None:
        self.seconds = self._first = seconds
        self._stop = threading.Event()
        self.forget()

    def forget(self) -> None:
        """Go back to what holds where nothing can be saved."""
        self.seconds, self.file, self.on_stall = self._first, None, lambda message: None

    def watch(self) -> None:
        """End the process once the last beat is too long ago; the body of the thread."""
        every_s = min(1.0, self.seconds / 4)
        expected = monotonic() + every_s
        while not self._stop.wait(every_s):
            now = monotonic()
            if now - expected > self.seconds / 2:  # the machine was asleep, or this process stopped
                beat()
            expected = now + every_s
            if now - _last_beat > self.seconds:
                self._end(now - _last_beat)

    def _end(self, idle_s: float) -> None:
        # what follows may hang on the same disk
        last = threading.Timer(LAST_S, os._exit, (EXIT_CODE,))
        last.daemon = True
        last.start()
        message = (
            f"nothing has moved for {idle_s:.0f} s: the process ends, with exit code {EXIT_CODE}"
        )
        with suppress(Exception):
            sys.stderr.write(f"{message}; the stacks of its threads:\n")
            sys.stderr.flush()
            faulthandler.dump_traceback(2, all_threads=True)
        with suppress(Exception):
            if self.file is not None:
                with self.file.open("w") as file:
                    file.write(f"{message}\n")
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
        with suppress(BaseException):
            self.on_stall(message)
        os._exit(EXIT_CODE)

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()


_active: Watchdog | None = None


@contextmanager
def watching(minutes: float) -> Iterator[Watchdog]:
    """Watch this process until the end; nested uses share the outermost watchdog."""
    global _active
    if _active is not None:
        yield _active
        return
    _active = watchdog = Watchdog(60 * minutes)
    beat()
    thread = threading.Thread(target=watchdog.watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield watchdog
    finally:
        watchdog.stop()
        _active = None
