"""Sets whose shards can be listed one by one: processes do so, and give columns instead of entries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from sfumato.data.parallel import forked_map, uses_processes

P = TypeVar("P")
USUAL_IMAGES = 1_000  # of a shard


def in_parts(list_shard: Callable[[str], P | None], shards: Sequence[str]) -> list[P] | None:
    """Return what a function makes of each shard, computed by processes.

    None where shards are few, or where the function returns it: the set is then to be listed as a
    whole.
    """
    if len(shards) < 2 or not uses_processes(USUAL_IMAGES * len(shards)):
        return None
    parts: list[P] = []
    for part in forked_map(list_shard, shards, chunk=1, images=USUAL_IMAGES):
        if part is None:
            return None
        parts.append(part)
    return parts
