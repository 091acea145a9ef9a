"""Work on many images at once in threads, which run in parallel since the parsers and the
resampling release the GIL.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os import cpu_count
from threading import Event
from typing import TypeVar

from sfumato.process.signals import raise_if_requested

In = TypeVar("In")
Out = TypeVar("Out")
CHUNK, AHEAD = 16, 8
POLL_S = 0.5  # of waiting for a chunk, after which signals are looked at


def ordered_map(function: Callable[[In], Out], items: Sequence[In]) -> Iterator[Out]:
    """Yield function(item) for each item, in order, computed by threads.

    At most AHEAD chunks of CHUNK items are worked on or wait, so that memory stays bounded.

    Raises:
        Interrupted: if a signal has asked the process to stop; what is worked on is finished, and
            the rest of its chunk is not begun.
    """
    stopped = Event()

    def work(part: Sequence[In]) -> list[Out]:
        return [function(item) for item in part if not stopped.is_set()]

    parts = (items[begin : begin + CHUNK] for begin in range(0, len(items), CHUNK))
    waiting: deque[Future[list[Out]]] = deque()
    with ThreadPoolExecutor(max(1, min(8, cpu_count() or 1))) as pool:
        try:
            for part in parts:
                waiting.append(pool.submit(work, part))
                if len(waiting) >= AHEAD:
                    yield from _result(waiting.popleft())
            while waiting:
                yield from _result(waiting.popleft())
        finally:
            stopped.set()
            for future in waiting:
                future.cancel()


def _result(future: Future[list[Out]]) -> list[Out]:
    """Wait for a result, and for signals."""
    while True:
        try:
            return future.result(timeout=POLL_S)
        except TimeoutError:
            if future.done():  # the function's own
                raise
            raise_if_requested()
