"""Several processes that work on one run: how they are started, and what they say to one another.

Only this package knows torch.distributed.
"""

from __future__ import annotations

from sfumato.distributed.world import World, current, is_agreed, joined, seconds

__all__ = ["World", "current", "is_agreed", "joined", "seconds"]
