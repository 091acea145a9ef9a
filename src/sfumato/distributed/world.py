"""The processes of a run: which one this is, and what they agree on.

A run of one process uses no process group, and the same code: what it agrees on with itself is what
it says. Every method is a collective operation: all processes call it, in the same order.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from sfumato.errors import ConfigError
from sfumato.process import signals

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

STORE = "SFUMATO_STORE"  # a file through which the processes of one machine find each other


class World:
    """The processes that work on a run.

    Attributes:
        rank: the number of this one, from 0.
        size: how many there are.
        local_rank: the number of this one on its machine.
        per_machine: how many there are on this machine.
    """

    rank, size, local_rank, per_machine = 0, 1, 0, 1

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank

    @property
    def machine(self) -> int:
        """The number of this process's machine, from 0."""
        return self.rank // self.per_machine

    @property
    def machines(self) -> int:
        """How many machines there are."""
        return -(-self.size // self.per_machine)

    @property
    def shares(self) -> list[slice]:
        """Which of many things this process puts into the cache, round after round: its share among all
        processes; then, since each machine may have a cache of its own, its share among those of its
        machine, of what is missing there.
        """
        own = slice(self.local_rank, None, self.per_machine)
        return [own] if self.machines == 1 else [slice(self.rank, None, self.size), own]

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run's files, and shows its progress."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank; they are plain data, as JSON holds them."""
        return [value]

    def gather_equal(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all processes, by rank; they have equal shapes."""
        return [tensor]

    def begin_sum(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to replace a tensor by its sum over all processes, and return what waits for it."""
        return lambda: None

    def on_first(self, work: Callable[[], T]) -> T:
        """Do some work in the first process only, and return its result in all.

        The result is plain data, as JSON holds it. For the work, this process is the only one: the
        others wait.

        Raises:
            Exception: what the work raises, in the first process.
            PeerError, Interrupted: in the others, if it raises.
        """
        return work()

    def in_turn(self, work: Callable[[], T]) -> T:
        """Do some work in the first process, then in the first one of each other machine, then in
        the others.

        What the earlier ones put into the cache, the later ones find there.

        Raises:
            PeerError, Interrupted: if it has failed in an earlier process.
        """
        return work()

    def together(self, work: Callable[[], T]) -> T:
        """Do some work in all processes at once, none of which goes on before all have done it.

        Raises:
            PeerError, Interrupted: if it has failed in another process.
        """
        return work()

    def span(self, count: int) -> slice:
        """Return which of `count` things this process does where all must do equally many: the last
        processes' spans overlap if they do not divide evenly.
        """
        each = -(-count // self.size)
        begin = min(self.rank % self.size * each, count - each)
        return slice(begin, begin + each)

    def join_spans(self, own: Tensor, count: int) -> Tensor:
        """Return `count` rows from the spans of all processes, each of which has those of its own."""
        parts = self.gather_equal(own)
        each = len(own)
        begins = [min(rank * each, count - each) for rank in range(len(parts))]
        return _concatenate(
            [
                part[rank * each - begin :]
                for rank, (begin, part) in enumerate(zip(begins, parts, strict=True))
                if rank * each < count
            ]
        )

    @property
    def agreement(self) -> Callable[[int], int] | None:
        """How the processes agree on a signal; see `signals.agreed_by`."""
        return None


_SINGLE = World()
_current = _SINGLE


def _concatenate(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    import torch

    return torch.cat(parts)


@contextmanager
def alone(rank: int) -> Iterator[None]:
    """Let this process work as if there were no others; it keeps its number."""
    global _current
    before, _current = _current, World(rank)
    try:
        with signals.agreed_by(None):
            yield
    finally:
        _current = before


def seconds() -> float:
    """Return the time of the first process's clock, by which all decide what there is time for."""
    return _current.on_first(time.perf_counter)


def is_agreed(error: BaseException) -> bool:
    """Return whether all processes have raised an error, or its like, at the same place."""
    return getattr(error, "is_agreed", False)


def current() -> World:
    """Return the processes that this one works with."""
    return _current


@contextmanager
def joined() -> Iterator[World]:
    """Join the other processes, if torchrun, a cluster or `--procs` has started several.

    Nested uses share the outermost group.

    Raises:
        ConfigError: if WORLD_SIZE, RANK and so on do not say what they should.
    """
    global _current
    size = _number("WORLD_SIZE", 1)
    if size == 1 or _current is not _SINGLE:
        yield _current
        return
    from sfumato.distributed.group import Group

    if "RANK" not in os.environ:
        raise ConfigError(
            f"WORLD_SIZE={size}, and RANK is not set",
            where="environment",
            hint="set RANK, or unset WORLD_SIZE to work in one process",
        )
    rank = _number("RANK", 0)
    _current = group = Group.join(
        rank, size, _number("LOCAL_RANK", rank), _number("LOCAL_WORLD_SIZE", size)
    )
    try:
        yield group
    finally:
        _current = _SINGLE
        group.leave()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(
            f"{name}={text!r} is not a number",
            where="environment",
            hint="torchrun sets WORLD_SIZE, RANK and LOCAL_RANK; unset them to train in one process",
        )
    return int(text)
