"""Sums of gradients over all processes, which run while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from weakref import ref

import torch
from torch import Tensor, nn

from sfumato.distributed.world import World

BUCKET_BYTES = 25 * 2**20  # of gradients that are summed at once


class GradientSum:
    """The sums of some parameters' gradients, taken once in each step.

    Parameters are put into buckets in the order in which the first process's first step has completed
    their gradients; those that no process has a gradient for come last. In a step's last backward
    pass the sum of a bucket begins once all its gradients are there, and all before it have begun: so
    all processes begin them in one order. A gradient that some processes do not have counts as zero;
    one that none has stays absent.

    A sum that has begun stands when a process repeats its passes for want of memory: what it has
    given was complete.

    Source: Li et al. 2020, PyTorch Distributed (arXiv:2006.15704), section 3.2.
    """

    def __init__(self, world: World, parameters: Sequence[nn.Parameter]) -> None:
        self._world, self._parameters = world, list(parameters)
        self._idle: set[int] = set()  # parameters that no process had a gradient for
        self._order: list[int] | None = None
        self._arrived: list[int] = []
        self._in_step = self._is_last = False
        self._begun: list[tuple[Tensor, Callable[[], None]]] = []
        self._arrange(range(len(self._parameters)))
        for number, parameter in enumerate(self._parameters):
            # a hook that holds this object would keep it, and the parameter, for ever
            parameter.register_post_accumulate_grad_hook(partial(_notify, ref(self), number))

    def _arrange(self, order: Iterable[int]) -> None:
        """Put parameters into buckets, the idle ones last."""
        order = list(order)
        busy = [number for number in order if number not in self._idle]
        idle = [number for number in order if number in self._idle]
        self._buckets = [
            *_buckets(self._parameters, busy), *_buckets(self._parameters, idle)
        ]  # fmt: skip
        self._bucket_of = {
            number: place for place, bucket in enumerate(self._buckets) for number in bucket
        }

    def begin(self) -> None:
        """Begin a step; backward passes outside of steps sum nothing."""
        self._begun, self._in_step = [], True

    def abandon(self) -> None:
        """End a step that has failed; later backward passes sum nothing."""
        self._in_step = self._is_last = False

    def expect(self, *, last: bool) -> None:
        """Say before a backward pass whether it is the step's last one."""
        self._is_last = last and self._in_step
        self._missing = [len(bucket) for bucket in self._buckets]
        self._arrived = []

    def finish(self) -> None:
        """Replace the gradients by their sums, of which those that have not begun begin now."""
        self._in_step = self._is_last = False
        while len(self._begun) < len(self._buckets):
            self._sum_next()
        idle = set()
        for bucket, (flat, wait) in zip(self._buckets, self._begun, strict=True):
            wait()
            idle |= self._take(bucket, flat)
        self._begun = []
        if self._order is None or idle != self._idle:
            self._idle = idle
            self._order = self._order or self._agreed_order()
            self._arrange(self._order)

    def _agreed_order(self) -> list[int]:
        """Return the order of the first process; what it has no gradient for comes last."""
        arrived = dict.fromkeys([*self._arrived, *range(len(self._parameters))])
        return self._world.gather(list(arrived))[0]

    def _take(self, bucket: list[int], flat: Tensor) -> set[int]:
        """Take the sums of a bucket, and return those of its parameters that nobody had a gradient for."""
        parameters = [self._parameters[number] for number in bucket]
        *parts, present = flat.split([*(p.numel() for p in parameters), len(bucket)])
        certain = all(p.grad is not None for p in parameters) and not self._idle.intersection(
            bucket
        )
        counts = [1.0] * len(bucket) if certain else present.tolist()  # waits for the device
        for parameter, part, count in zip(parameters, parts, counts, strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(part.view_as(parameter))
            elif count:  # in the layout of the parameter, as optimizers expect it
                parameter.grad = torch.empty_like(parameter).copy_(part.view_as(parameter))
        return {number for number, count in zip(bucket, counts, strict=True) if not count}

    def complete(self, number: int) -> None:
        """Note that the gradient of a parameter is complete."""
        if not self._is_last:
            return
        self._arrived.append(number)
        self._missing[self._bucket_of[number]] -= 1
        if self._order is None:  # in the first step the order is only looked at
            return
        while len(self._begun) < len(self._buckets) and not self._missing[len(self._begun)]:
            self._sum_next()

    def _sum_next(self) -> None:
        parameters = [self._parameters[number] for number in self._buckets[len(self._begun)]]
        gradients = [
            (torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters
        ]
        present = gradients[0].new_ones(len(parameters))
        for place, parameter in enumerate(parameters):
            if parameter.grad is None:
                present[place] = 0
        flat = torch.cat([*gradients, present])
        self._begun.append((flat, self._world.begin_sum(flat)))


def _notify(summed: ref[GradientSum], number: int, parameter: Tensor) -> None:
    if (there := summed()) is not None:
        there.complete(number)


def _buckets(parameters: Sequence[nn.Parameter], order: Sequence[int]) -> list[list[int]]:
    """Return numbers of parameters in this order, those of one dtype and device at once."""
    buckets: list[list[int]] = []
    held = BUCKET_BYTES
    for number in order:
        parameter = parameters[number]
        like = buckets and _kind(parameters[buckets[-1][0]]) == _kind(parameter)
        if held >= BUCKET_BYTES or not like:
            buckets.append([])
            held = 0
        buckets[-1].append(number)
        held += parameter.numel() * parameter.element_size()
    return buckets


def _kind(parameter: nn.Parameter) -> tuple[torch.dtype, torch.device]:
    return parameter.dtype, parameter.device
