"""Work on many images at once; the parsers and the resampling let other threads run meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os import cpu_count
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")
CHUNK, AHEAD = 16, 8


def ordered_map(function: Callable[[In], Out], items: Sequence[In]) -> Iterator[Out]:
    """function(item) for each item, in order; at most AHEAD chunks are worked on or wait, so memory
    stays bounded.
    """

    def work(part: Sequence[In]) -> list[Out]:
        return [function(item) for item in part]

    parts = (items[begin : begin + CHUNK] for begin in range(0, len(items), CHUNK))
    waiting: deque[Future[list[Out]]] = deque()
    with ThreadPoolExecutor(max(1, min(8, cpu_count() or 1))) as pool:
        for part in parts:
            waiting.append(pool.submit(work, part))
            if len(waiting) >= AHEAD:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
