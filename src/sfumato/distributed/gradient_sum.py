"""Sums of gradients over all processes, which run while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from sfumato.distributed.world import World

BUCKET_BYTES = 25 * 2**20  # of gradients that are summed at once


class GradientSum:
    """The sums of some parameters' gradients, taken once in each step.

    Parameters are taken from the last to the first, which is about the order in which a backward
    pass completes their gradients, and put into buckets. In a step's last backward pass the sum of a
    bucket begins once all its gradients are there, and all before it have begun: so all processes
    begin them in one order. A gradient that some processes do not have counts as zero; one that none
    has stays absent.

    A sum that has begun stands when a process repeats its passes for want of memory: what it has
    given was complete.

    Source: Li et al. 2020, PyTorch Distributed (arXiv:2006.15704), section 3.2.
    """

    def __init__(self, world: World, parameters: Sequence[nn.Parameter]) -> None:
        self._world = world
        self._buckets = _buckets(parameters)
        self._missing: list[int] = []  # gradients that each bucket still waits for
        self._begun: list[tuple[Tensor, Callable[[], None]]] = []
        self._in_step = self._is_last = False
        for number, bucket in enumerate(self._buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(partial(self._complete, number))

    def begin(self) -> None:
        """Begin a step; backward passes outside of steps sum nothing."""
        self._begun, self._in_step = [], True

    def expect(self, *, last: bool) -> None:
        """Say before a backward pass whether it is the step's last one."""
        self._is_last = last and self._in_step
        self._missing = [len(bucket) for bucket in self._buckets]

    def finish(self) -> None:
        """Replace the gradients by their sums, of which those that have not begun begin now."""
        self._in_step = self._is_last = False
        while len(self._begun) < len(self._buckets):
            self._sum_next()
        for bucket, (flat, wait) in zip(self._buckets, self._begun, strict=True):
            wait()
            *parts, present = flat.split([*(p.numel() for p in bucket), len(bucket)])
            for parameter, part, count in zip(bucket, parts, present, strict=True):
                if parameter.grad is not None:
                    parameter.grad.copy_(part.view_as(parameter))
                elif count.item():  # waits for the device, and is rare
                    parameter.grad = part.view_as(parameter).clone()
        self._begun = []

    def _complete(self, number: int, parameter: Tensor) -> None:
        """Note that a gradient is complete."""
        if not self._is_last:
            return
        self._missing[number] -= 1
        while len(self._begun) < len(self._buckets) and not self._missing[len(self._begun)]:
            self._sum_next()

    def _sum_next(self) -> None:
        bucket = self._buckets[len(self._begun)]
        present = torch.tensor([p.grad is not None for p in bucket], device=bucket[0].device)
        gradients = [
            (torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket
        ]
        flat = torch.cat([*gradients, present.to(bucket[0].dtype)])
        self._begun.append((flat, self._world.begin_sum(flat)))


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return parameters from the last to the first, those of one dtype and device at once."""
    buckets: list[list[nn.Parameter]] = []
    held = BUCKET_BYTES
    for parameter in reversed(parameters):
        like = buckets and _kind(buckets[-1][0]) == _kind(parameter)
        if held >= BUCKET_BYTES or not like:
            buckets.append([])
            held = 0
        buckets[-1].append(parameter)
        held += parameter.numel() * parameter.element_size()
    return buckets


def _kind(parameter: nn.Parameter) -> tuple[torch.dtype, torch.device]:
    return parameter.dtype, parameter.device
