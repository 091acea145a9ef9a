"""Work on many images at once in threads, which run in parallel since the parsers and the
resampling release the GIL.
"""

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
    """Yield function(item) for each item, in order, computed by threads.

    At most AHEAD chunks of CHUNK items are worked on or wait, so that memory stays bounded.
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
