"""Batches in the plan's order, decoded ahead by worker processes where the set is not in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from sfumato import randomness
from sfumato.data.dataset import Dataset, Reject
from sfumato.data.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a training step is given.

    Attributes:
        images: float32 in [-1, 1], (B, C, H, W).
        context: what conditioners may read: "category", the index into the set's categories or -1, (B,).
        bad: pictures that could not be read and were replaced.
    """

    images: Tensor
    context: Mapping[str, Tensor]
    bad: Sequence[Reject] = ()


def to_float(pixels: Tensor) -> Tensor:
    """uint8 from 0 to 255 -> float32 from -1 to 1."""
    return pixels.to(torch.float32).div_(127.5).sub_(1)


class _Batches(TorchDataset[tuple[Tensor, dict[str, Tensor], list[Reject]]]):
    """Batch k of the plan as uint8 pixels, what a worker process computes."""

    def __init__(self, dataset: Dataset, plan: Plan) -> None:
        self.dataset, self.plan = dataset, plan

    def __getitem__(self, step: int) -> tuple[Tensor, dict[str, Tensor], list[Reject]]:
        positions = self.dataset.training[self.plan.batch(step)]
        pixels, bad = self.dataset.images(positions)
        if self.dataset.config.flip == "horizontal":
            first = step * self.plan.batch_size
            mirrored = randomness.uniform(self.plan.seed, "flip", first=first, count=len(pixels))[:, 0] < 0.5
            pixels = torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
        return pixels, self.dataset.context(positions), bad


def batches(dataset: Dataset, plan: Plan, *, start: int) -> Iterator[Batch]:
    """Training batches `start`, `start + 1`, ... without end; the same ones for any number of workers."""
    workers = 0 if dataset.pixels is not None else dataset.config.workers
    loader = DataLoader(
        _Batches(dataset, plan),
        batch_size=None,
        sampler=_CountFrom(start),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
    for pixels, context, bad in loader:
        yield Batch(images=to_float(pixels), context=context, bad=bad)


class _CountFrom:
    """start, start + 1, ...: a sampler that does not end."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        step = self.start
        while True:
            yield step
            step += 1

    def __len__(self) -> int:
        return 2**62
