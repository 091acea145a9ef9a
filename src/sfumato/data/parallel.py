"""Work on many items at once, in threads or in processes."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from os import cpu_count
from threading import Event
from typing import Any, TypeVar

from sfumato.errors import DataError, SfumatoError
from sfumato.platform import die_with_parent
from sfumato.process.signals import raise_if_requested

In = TypeVar("In")
Out = TypeVar("Out")
CHUNK, AHEAD = 16, 8
POLL_S = 0.5  # of waiting for a chunk, after which signals are looked at
MIN_FORKED = 2000  # items, below which threads have done before processes are there
TALLIES = 1024  # processes of a machine that count
MOST_BROKEN = 3  # times in a row that processes are begun again after one has died

_forked: Callable[[Any], Any] | None = None  # what processes do; they have it from their parent


def ordered_map(function: Callable[[In], Out], items: Sequence[In]) -> Iterator[Out]:
    """Yield function(item) for each item, in order, computed by threads, which run in parallel where
    the function releases the interpreter's lock.

    At most AHEAD chunks of CHUNK items are worked on or wait, so that memory stays bounded.

    Raises:
        Interrupted: if a signal has asked the process to stop; what is worked on is finished, and
            the rest of its chunk is not begun.
    """
    stopped = Event()

    def work(part: Sequence[In]) -> list[Out]:
        return [function(item) for item in part if not stopped.is_set()]

    with ThreadPoolExecutor(max(1, min(8, cpu_count() or 1))) as pool:
        try:
            for result in _in_order(pool, work, _chunks(items)):
                yield from result
        finally:
            stopped.set()


class Tally:
    """A number that processes count up together, and a request to all of them to stop.

    Each process has its own count, without a lock: a killed process would hold a lock for ever.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        self._counts, self._stops = context.RawArray("q", TALLIES), context.RawValue("b", 0)

    def add(self) -> bool:
        """Count one more; return whether to go on."""
        self._counts[os.getpid() % TALLIES] += 1
        return not self._stops.value

    @property
    def count(self) -> int:
        """What was counted so far."""
        return sum(self._counts)

    def stop(self) -> None:
        """Ask all processes to stop."""
        self._stops.value = 1


def uses_processes(count: int) -> bool:
    """Return whether processes work on `count` images: they pay where there are many."""
    several = (cpu_count() or 1) > 1 and count >= MIN_FORKED
    return several and sys.platform == "linux" and _is_main_thread()


def forked_map(
    function: Callable[[In], Out],
    items: Sequence[In],
    *,
    chunk: int = CHUNK,
    images: int = 1,
    on_wait: Callable[[], None] = lambda: None,
    on_stop: Callable[[], None] = lambda: None,
) -> Iterator[Out]:
    """Yield function(item) for each item, in order, as `ordered_map` does, computed by processes where
    there are many items: the interpreter's lock lets threads read small images no faster than one.

    Processes are forked with all that the function needs; items and results are pickled. If one
    dies, others do its work.

    Args:
        chunk: items that a process is given at once.
        images: about how many images an item is.
        on_wait: is called twice a second where processes are waited for.
        on_stop: is called before processes are waited for that have work left.
    Raises:
        Interrupted: as `ordered_map`.
        DataError: if processes die again and again, as they do for want of memory.
    """
    if not uses_processes(images * len(items)):
        yield from ordered_map(function, items)
        return
    parts = list(_chunks(items, chunk))
    done = broken = 0
    while done < len(parts):
        try:
            for result in _by_processes(function, parts[done:], on_wait, on_stop):
                yield from result
                done, broken = done + 1, 0
        except BrokenProcessPool:
            raise_if_requested()  # a signal to all processes has ended these, too
            broken += 1
            if broken > MOST_BROKEN:
                raise DataError(
                    f"processes that read images have died {broken} times in a row",
                    where="data",
                    hint="see whether memory is short (dmesg); what was read so far is kept",
                ) from None


def _by_processes(
    function: Callable[[In], Out],
    parts: Sequence[Sequence[In]],
    on_wait: Callable[[], None],
    on_stop: Callable[[], None],
) -> Iterator[list[Out]]:
    global _forked
    _forked = function
    pool = ProcessPoolExecutor(
        cpu_count(), multiprocessing.get_context("fork"), initializer=die_with_parent
    )
    try:
        yield from _in_order(pool, _in_process, iter(parts), on_wait)
    except BrokenProcessPool:
        raise
    except BaseException:
        on_stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        _forked = None


def _in_process(part: Sequence[Any]) -> list[Any]:
    assert _forked is not None
    try:
        return [_forked(item) for item in part]
    except Exception as error:
        if isinstance(error, SfumatoError) or type(error).__module__ == "builtins":
            raise
        # others may not survive the way to the parent, which would take that for the end of this process
        raise RuntimeError(f"{type(error).__name__}: {error}") from None


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _chunks(items: Sequence[In], size: int = CHUNK) -> Iterator[Sequence[In]]:
    return (items[begin : begin + size] for begin in range(0, len(items), size))


def _in_order(
    pool: Executor,
    work: Callable[[Sequence[In]], list[Out]],
    parts: Iterator[Sequence[In]],
    on_wait: Callable[[], None] = lambda: None,
) -> Iterator[list[Out]]:
    """Yield the result of each part, in order."""
    waiting: deque[Future[list[Out]]] = deque()
    try:
        for part in parts:
            waiting.append(pool.submit(work, part))
            if len(waiting) >= AHEAD:
                yield _result(waiting.popleft(), on_wait)
        while waiting:
            yield _result(waiting.popleft(), on_wait)
    finally:
        for future in waiting:
            future.cancel()


def _result(future: Future[list[Out]], on_wait: Callable[[], None]) -> list[Out]:
    """Wait for a result, and for signals."""
    while True:
        try:
            return future.result(timeout=POLL_S)
        except TimeoutError:
            if future.done():  # meanwhile, or the error is the function's own
                return future.result()
            raise_if_requested()
            on_wait()
