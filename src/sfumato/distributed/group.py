"""Several processes, joined by a process group of PyTorch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed
from torch import Tensor

from sfumato.distributed.world import STORE, World, alone
from sfumato.errors import CheckpointError, PeerError
from sfumato.process import watchdog
from sfumato.process.signals import Interrupted

T = TypeVar("T")

# errors of one process after which a run may go on: the others raise the same, and go on alike
TOLERATED: dict[str, type[Exception]] = {"disk": OSError, "checkpoint": CheckpointError}
# the watchdog ends a process that waits too long, with its stacks; after that long, torch does
TIMEOUT = timedelta(hours=24)
LONGEST_PAUSE_S = 0.05  # between two looks whether the others are there


class Group(World):
    """The processes of a torch process group."""

    def __init__(self, rank: int, size: int, local_rank: int, per_machine: int) -> None:
        super().__init__(rank)
        self.size, self.local_rank, self.per_machine = size, local_rank, per_machine

    @classmethod
    def join(cls, rank: int, size: int, local_rank: int, per_machine: int) -> Group:
        """Wait for the other processes, and join them."""
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(local_rank)
        with _lost_peers():
            torch.distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                timeout=TIMEOUT,
                rank=rank,
                world_size=size,
                init_method=f"file://{os.environ[STORE]}" if STORE in os.environ else "env://",
            )
        return cls(rank, size, local_rank, per_machine)

    def leave(self) -> None:
        """Leave the group."""
        torch.distributed.destroy_process_group()

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = self._gathered(torch.tensor([len(text)]), [1] * self.size)
        parts = self._gathered(text, [int(length) for length in lengths])
        return [json.loads(bytes(part.tolist())) for part in parts]

    def _gathered(self, tensor: Tensor, lengths: list[int]) -> list[Tensor]:
        """Return the vectors of all processes, whose lengths differ."""
        most = max(lengths)
        padded = torch.zeros(most, dtype=tensor.dtype)
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in lengths]
        with _lost_peers():
            torch.distributed.all_gather(parts, padded)
        return [part[:length] for part, length in zip(parts, lengths, strict=True)]

    def gather_equal(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all processes, by rank."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        with _lost_peers():
            torch.distributed.all_gather(parts, tensor.contiguous())
        return parts

    def begin_sum(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to replace a tensor by its sum over all processes; see `World.begin_sum`."""
        with _lost_peers():
            work = torch.distributed.all_reduce(tensor, async_op=True)

        def wait() -> None:
            with _lost_peers():
                work.wait()

        return wait

    def on_first(self, work: Callable[[], T]) -> T:
        """Do some work in the first process only; see `World.on_first`."""
        result, error = self._attempt(work) if self.is_first else (None, None)
        outcome = self._outcomes(_outcome(result, error), error)[0]
        return cast(T, result if self.is_first and error is None else _opened(outcome, error))

    def together(self, work: Callable[[], T]) -> T:
        """Do some work in all processes at once; see `World.together`."""
        result, error = self._attempt(work)
        for outcome in self._outcomes(_outcome(None, error), error):
            _opened(outcome, error)
        return cast(T, result)

    def _attempt(self, work: Callable[[], Any]) -> tuple[Any, BaseException | None]:
        try:
            with alone(self.rank):
                return work(), None
        except BaseException as error:
            return None, error

    def _outcomes(
        self, outcome: dict[str, Any], error: BaseException | None
    ) -> list[dict[str, Any]]:
        """Return the outcomes of all processes; an error of this one is not hidden by another's."""
        try:
            self._wait()
            return self.gather(outcome)
        except PeerError as lost:
            raise error or lost from None

    def _wait(self) -> None:
        """Wait until all processes are here: what one of them does alone may take hours, and is not
        taken for a hang, which its own watchdog would find.
        """
        with _lost_peers():
            work = torch.distributed.all_reduce(torch.zeros(1), async_op=True)
            pause_s = 1e-4
            while not work.is_completed():
                watchdog.beat()
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            work.wait()

    def in_turn(self, work: Callable[[], T]) -> T:
        """Do some work in one process after another; see `World.in_turn`."""
        turn = 0 if self.is_first else 1 if self.local_rank == 0 else 2
        result: Any = None
        for number in range(3):
            result, error = self._attempt(work) if turn == number else (result, None)
            for outcome in self._outcomes(_outcome(None, error), error):
                _opened(outcome, error)
        return cast(T, result)

    @property
    def agreement(self) -> Callable[[int], int] | None:
        """How the processes agree on a signal."""
        return lambda number: max(self.gather(number))


def _outcome(result: Any, error: BaseException | None) -> dict[str, Any]:
    """Return what the other processes are told of some work."""
    if isinstance(error, Interrupted):
        return {"signal": error.exit_code - 128}
    if error is None:
        return {"result": result}
    kind = next((name for name, type_ in TOLERATED.items() if isinstance(error, type_)), "")
    return {"error": f"{type(error).__name__}: {error}", "kind": kind}


def _opened(outcome: dict[str, Any], error: BaseException | None) -> Any:
    """Return a result, or raise what the work has raised, here or in the first process."""
    if error is not None:
        error.is_agreed = True  # type: ignore[attr-defined]
        raise error
    if "signal" in outcome:
        interrupted = Interrupted(outcome["signal"])
        interrupted.is_said = True
        raise interrupted
    if "error" in outcome:
        told = TOLERATED.get(outcome["kind"], PeerError)(
            "another process of this run has failed: " + outcome["error"][:500]
        )
        told.is_agreed = True  # type: ignore[attr-defined]
        raise told
    return outcome.get("result")


@contextmanager
def _lost_peers() -> Iterator[None]:
    """Turn the errors of a process group, one of whose processes has ended, into one of ours."""
    watchdog.beat()
    try:
        yield
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
        raise PeerError(f"another process of this run has ended ({first})") from error
    watchdog.beat()
