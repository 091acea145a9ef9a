"""The fate of each file of a set: it becomes an image, describes images, or is left out with a
reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from sfumato.data.listing import Reject, printable_name

KINDS = {
    "captions": "captions",
    "json": "JSON files",
    "cls": "category files",
    "doodle": "doodles",
    "mask": "masks",
    "points": "point clouds",
}


@dataclass(kw_only=True)
class FileStatus:
    """What is known so far; the first fate of a file is final.

    Attributes:
        display_name: a name as people see it.
        rejects: what is left out; remarks: how the set is read.
        sidecars: files that say something about images, by kind.
        resolved: files whose fate is known.
    """

    display_name: Callable[[str], str] = printable_name
    rejects: list[Reject] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    sidecars: Counter[str] = field(default_factory=Counter)
    resolved: set[str] = field(default_factory=set)

    def use(self, name: str) -> None:
        """Record that a file becomes an image."""
        self.resolved.add(name)

    def leave_out(self, name: str, reason: str) -> None:
        """Record that a file is left out, unless its fate is known."""
        if name not in self.resolved:
            self.resolved.add(name)
            self.rejects.append(Reject(self.display_name(name), reason))

    def count(self, name: str, kind: str) -> None:
        """Record that a file of some `kind` describes images, unless its fate is known."""
        if name not in self.resolved:
            self.resolved.add(name)
            self.sidecars[kind] += 1
