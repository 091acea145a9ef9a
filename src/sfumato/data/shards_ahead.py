"""Shards behind addresses, fetched before training comes to them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Event

import numpy as np

from sfumato.data import files, remote
from sfumato.data.batch_plan import BatchPlan
from sfumato.data.dataset import Dataset
from sfumato.data.file_types import ANNOTATION_FILES
from sfumato.data.listing import path_of

THREADS = 4
CLOSE_S = 1.0
WINDOWS = 2  # that are fetched: the one that is trained on, and the next


class ShardsAhead:
    """Fetches the shards of the window that training has come to, and of the next, by threads, where
    images are decoded as they are used.

    What cannot be fetched is left to the reading of its images, which says it.
    """

    def __init__(self, dataset: Dataset, plan: BatchPlan, *, say: Callable[[str], None]) -> None:
        self._dataset, self._plan, self._say = dataset, plan, say
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="fetch")
        self._stop = Event()
        self._running: set[Future[None]] = set()
        self._begun: dict[int, Future[None]] = {}
        self._files: dict[int, dict[str, int]] = {}  # of shards that were fetched, with their sizes
        self._wanted: list[int] = []
        self._is_said = False
        is_remote = files.is_url(str(getattr(dataset.config.source, "path", "")))
        self._is_needed = is_remote and dataset.decodes_on_use
        if not plan.is_windowed:
            self._say_that_the_order_is_global()

    def _say_that_the_order_is_global(self) -> None:
        """Print a line if windows have no effect, or would save downloads."""
        config = self._dataset.config
        if config.shuffle != "window" and not self._is_needed:
            return
        count = len(self._dataset.shards)
        if config.shuffle == "window":
            self._say(
                f"data.shuffle=window changes nothing: the set has {count} shards, and a window holds "
                f"{config.window}"
                if count <= config.window
                else "data.shuffle=window changes nothing: this run began before there were windows"
            )
        elif count > 1:
            self._say(
                f"images come from {count} shards in one random order, so that a shard that "
                "leaves the disk is fetched again: data.shuffle=window fetches each once in an epoch"
            )

    def follow(self, sample: int) -> None:
        """Begin to fetch what a sample and those after it need, unless that was begun before."""
        if not self._is_needed or not self._plan.is_windowed:
            return
        self._warn_of_size()
        windows = self._plan.upcoming(sample, WINDOWS)
        wanted = [int(shard) for shards in windows for shard in shards]
        if wanted == self._wanted:
            return
        self._wanted = wanted
        for shard in set(self._begun) - set(wanted):
            self._begun.pop(shard).cancel()
        self._files = {shard: self._files[shard] for shard in wanted if shard in self._files}
        self._running = {future for future in self._running if not future.done()}
        # all that are there are touched first, so that others leave for the new ones
        for shard in [shard for shard in dict.fromkeys(wanted) if not self._is_here(shard)]:
            if shard not in self._begun:
                self._begun[shard] = self._pool.submit(self._fetch, shard)
                self._running.add(self._begun[shard])

    def _is_here(self, shard: int) -> bool:
        """Return whether a shard that was fetched before is still there; it then leaves the disk last."""
        known = self._files.get(shard)
        return known is not None and all(list(map(remote.touch, known)))

    def _warn_of_size(self) -> None:
        """Say once if the disk may not hold what is fetched."""
        sizes = [
            size
            for shard in self._wanted
            for size in self._files.get(shard, dict[str, int]()).values()
        ]
        if sum(sizes) > remote.limit_bytes() and not self._is_said:
            self._is_said = True
            self._say(
                f"warning: {len(sizes)} files of {WINDOWS} windows take {sum(sizes) / 2**30:.1f} GiB, and "
                "SFUMATO_REMOTE_GIB allows less, so that shards are fetched more than once: lower "
                "data.window, or raise the limit"
            )

    def _fetch(self, shard: int) -> None:
        """Fetch a shard, and note the sizes of its files, in bytes."""
        paths = sorted(self._paths(shard))
        self._files[shard] = {path: remote.fetch(path, self._stop).stat().st_size for path in paths}

    def _paths(self, shard: int) -> set[str]:
        """Return the addresses of a shard's images and annotations."""
        begins = np.append(self._plan.shards, self._plan.size)
        positions = np.unique(self._dataset.epoch[begins[shard] : begins[shard + 1]])
        found = set()
        for position in positions.tolist():
            entry = self._dataset.entries[position]
            for blob in (entry.image, *(getattr(entry, name) for name in ANNOTATION_FILES)):
                path = None if blob is None else path_of(blob)
                if path is not None and files.is_url(path):
                    found.add(path)
        return found

    def pause(self) -> None:
        """Wait for what is being fetched, and fetch nothing more until `follow` is called again.

        A process must not be forked while its threads work: a lock that one of them holds is never
        released there.
        """
        for future in self._running:
            future.cancel()
        wait(self._running)
        self._begun, self._wanted = {}, []

    def close(self) -> None:
        """Stop; what is being fetched is given up, and waited for shortly: a store may not answer."""
        self._stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        wait(self._running, timeout=CLOSE_S)
