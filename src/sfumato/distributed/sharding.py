"""Tensors of which each process holds a part: how they are made, gathered and filled.

All functions take ordinary tensors too, and return them as they are.

Source: PyTorch's `fully_shard` (FSDP2), after Zhao et al. 2023 (arXiv:2304.11277).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
from torch import Tensor, nn

from sfumato.distributed.gradient_sum import GradientSum
from sfumato.distributed.world import World, current

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

EngineName = Literal["auto", "replicate", "shard", "hybrid"]


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether processes hold parts of a tensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the parts of all processes, each of which calls this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that is here; it shares its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def like(value: Tensor, target: Tensor) -> Tensor:
    """Return a whole tensor in the way that `target` is held: its part of this process."""
    if not is_sharded(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        value.to(target.device), target.device_mesh, target.placements, src_data_rank=None
    )


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole tensors in the first process, and {} in the others.

    They are gathered one after another, so that no process but the first holds them all.
    """
    first, result = current().is_first, {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if first:
            result[name] = value.cpu() if is_sharded(tensor) else value
    return result


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the norm of the gradients of parameters, some of which may be sharded."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = [
        whole(torch.nn.utils.get_total_norm(part))
        for part in (
            [gradient for gradient in gradients if not is_sharded(gradient)],
            [gradient for gradient in gradients if is_sharded(gradient)],
        )
        if part
    ]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def by_kind(tensors: Iterable[Any]) -> list[list[Any]]:
    """Split tensors into those that are sharded and those that are not: no operation takes both."""
    kinds: tuple[list[Any], list[Any]] = ([], [])
    for tensor in tensors:
        kinds[is_sharded(tensor)].append(tensor)
    return [kind for kind in kinds if kind]


class Engine:
    """How processes share a network: here, each holds all of it.

    Gradients are summed once in a step, in its last backward pass.
    """

    in_step = False  # whether all processes must pass through the network equally often

    def __init__(self, world: World) -> None:
        self.world = world
        self._sum: GradientSum | None = None

    def place(self, network: nn.Module, units: Sequence[nn.Module]) -> None:
        """Share a network; `units` are the parts of it that are needed one after another."""

    @contextmanager
    def summed(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Sum the gradients of parameters, the same in each step, over all processes, while and after
        the block computes them.
        """
        if self.world.size == 1:
            yield
            return
        self._sum = self._sum or GradientSum(self.world, parameters)
        self._sum.begin()
        try:
            yield
        except BaseException:
            self._sum.abandon()
            raise
        self._sum.finish()

    def expect(self, network: nn.Module, *, last: bool) -> None:
        """Say before a backward pass whether it is the step's last one."""
        if self._sum is not None:
            self._sum.expect(last=last)


class Sharded(Engine):
    """Each process holds a part of every parameter, its gradient, moments and averages.

    Attributes:
        copies: how many groups of processes hold the whole network: 1 where all of them share one
            copy, the number of machines where each has a copy of its own.
    """

    in_step = True

    def __init__(self, world: World, *, copies: int = 1) -> None:
        super().__init__(world)
        from torch.distributed.device_mesh import init_device_mesh

        kind = "cuda" if torch.cuda.is_available() else "cpu"
        if copies == 1:
            self.mesh = init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))
        else:
            self.mesh = init_device_mesh(
                kind, (copies, world.size // copies), mesh_dim_names=("replicate", "shard")
            )

    def place(self, network: nn.Module, units: Sequence[nn.Module]) -> None:
        """Shard a network in place; each of its units is gathered when it is needed."""
        from torch.distributed.fsdp import FSDPModule, fully_shard

        for parameter in network.parameters():  # other layouts are not supported there
            parameter.data = parameter.data.contiguous()
        for unit in units:
            fully_shard(unit, mesh=self.mesh)
        fully_shard(network, mesh=self.mesh)
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # gradients are those of the batch's mean
                module.set_force_sum_reduction_for_comms(True)

    def expect(self, network: nn.Module, *, last: bool) -> None:
        """Let gradients be summed in the last backward pass only. Those outside the network wait for its
        end: sums that begin by what gradients a process has would mix with the network's own.
        """
        network.set_requires_gradient_sync(last)  # type: ignore[operator]

    @contextmanager
    def summed(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Sum the gradients of parameters outside the network; it sums its own."""
        with super().summed([p for p in parameters if not is_sharded(p)]):
            yield
