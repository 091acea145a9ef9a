"""A live progress bar on a terminal; elsewhere, a plain line every few seconds."""

from __future__ import annotations

import math
import os
import re
import sys
import time
from types import TracebackType
from typing import Self, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from sfumato.distributed import current
from sfumato.process.signals import poll
from sfumato.process.streams import PatientStream

PLAIN_EVERY_S = 5.0
ETA_AFTER_S, ETA_FROM, ETA_UPDATES = (
    5.0,
    0.01,
    20,
)  # seconds, and share done or reports, before the time left means something
MEMORY_S = 60.0  # of work, over which its speed is averaged


def console() -> Console:
    """Return a console on standard error, so that standard output stays free for results.

    Of several processes, only the first one's prints.
    """
    return Console(
        file=cast(TextIO, _patient()), highlight=False, soft_wrap=True, quiet=not current().is_first
    )


def _patient() -> PatientStream:
    """Return standard error, as it is now, behind a stream that outlives its reader."""
    return sys.stderr if isinstance(sys.stderr, PatientStream) else PatientStream(sys.stderr)


def duration(seconds: float) -> str:
    """Format seconds as "1:05:09", or as "5:09" below an hour."""
    total = max(0, round(seconds))
    hours, minutes = divmod(total // 60, 60)
    return f"{hours}:{minutes:02d}:{total % 60:02d}" if hours else f"{minutes}:{total % 60:02d}"


def printable(text: str) -> str:
    """Replace control characters that could command a terminal or reorder a line; keep newlines.

    They may come from the name of a file.
    """
    return re.sub(
        "[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\N{REPLACEMENT CHARACTER}", text
    )


class ProgressBar:
    """A progress bar: `with ProgressBar("training") as bar: bar.update(fraction, "loss 0.1")`. The
    time left is estimated from the fraction.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.live = (
            sys.stderr.isatty() and not os.environ.get("CI") and "NO_COLOR" not in os.environ
        )
        self._last_line = time.monotonic()
        self._left, self._label = TimeLeft(self._last_line), ""
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"),
            console=console(),
            refresh_per_second=4,
            disable=not self.live,
        )
        self._task = self._bar.add_task(title, total=1.0, text="", left="?")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def start_at(self, fraction: float) -> None:
        """Set the fraction at which a resumed run begins, from which the time left is estimated."""
        self._left.start_at(fraction)

    def update(self, fraction: float, text: str) -> None:
        """Show the fraction of the work done (0 to 1) and a few figures.

        Raises:
            Interrupted: if a signal has asked the process to stop.
        """
        poll()
        now, text = time.monotonic(), "  ".join(filter(None, (text, self._label)))
        seconds = self._left.at(now, fraction)
        left = "?" if seconds is None else duration(seconds)
        self._bar.update(self._task, completed=fraction, text=text, left=left)
        if not self.live and (now - self._last_line >= PLAIN_EVERY_S or fraction >= 1):
            self._last_line = now
            self.say(f"{self.title} {fraction:4.0%}  {text}  left {left}")

    def label(self, text: str) -> None:
        """Show a word or two after the figures from now on."""
        self._label = text

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(printable(line), markup=False)


class TimeLeft:
    """An estimate of the time left, from the speed so far, in which recent speed counts more."""

    def __init__(self, begun: float) -> None:
        self._begun = self._last = begun
        self._from = self._last_fraction = 0.0
        self._updates, self._speed = 0, 0.0

    def start_at(self, fraction: float) -> None:
        """Set the fraction at which the work begins, if not at 0."""
        self._from = self._last_fraction = fraction

    def at(self, now: float, fraction: float) -> float | None:
        """Estimate the seconds left at time `now`; None until enough is done to tell."""
        self._updates += 1
        gained, passed = fraction - self._last_fraction, now - self._last
        if gained > 0 and passed > 0:
            # the mean of all while there are few
            share = max(1 - math.exp(-passed / MEMORY_S), 1 / self._updates)
            self._speed += share * (gained / passed - self._speed)
            self._last, self._last_fraction = now, fraction
        if fraction >= 1:
            return 0.0
        reliable = now - self._begun >= ETA_AFTER_S and (
            fraction - self._from >= ETA_FROM or self._updates >= ETA_UPDATES
        )
        return (1 - fraction) / self._speed if reliable and self._speed > 0 else None


class Clock:
    """The seconds spent on some work, including earlier processes, and the speed since the last
    lap.
    """

    def __init__(self, seconds_before: float, steps_before: int) -> None:
        self._origin = time.perf_counter() - seconds_before
        self._lap, self._lap_step, self._waited = time.perf_counter(), steps_before, 0.0

    def seconds(self) -> float:
        """Return the seconds spent so far, including those of earlier processes."""
        return time.perf_counter() - self._origin

    def wait(self, seconds: float) -> None:
        """Add `seconds` to the time spent waiting for data in this lap."""
        self._waited += seconds

    def lap(self, batch_size: int, step: int) -> tuple[float, float]:
        """Return images/s, and the ms per step spent waiting for data, since the last call."""
        now, steps = time.perf_counter(), step - self._lap_step
        speed, wait_ms = steps * batch_size / (now - self._lap), 1000 * self._waited / steps
        self._lap, self._lap_step, self._waited = now, step, 0.0
        return speed, wait_ms


def short(value: float) -> str:
    """Format a number with four decimals, or in scientific notation below 1e-3."""
    return f"{value:.4f}" if value >= 1e-3 else f"{value:.2e}"
