"""Batches in the order of the plan, decoded ahead by worker processes where pixels are not kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from sfumato import randomness
from sfumato.data.augment import augment, augmentation_draws
from sfumato.data.batch_plan import BatchPlan
from sfumato.data.dataset import Dataset
from sfumato.data.file_types import ANNOTATION_FILES
from sfumato.data.listing import Reject
from sfumato.data.remote import known_signs, note_signs
from sfumato.platform import die_with_parent

TIMEOUT_S = 1.0  # of waiting for processes that read ahead, after which signals are looked at
# they lie over the image, and move along with it
SPATIAL_ANNOTATIONS = (*ANNOTATION_FILES, "loss_mask")


@dataclass(frozen=True, kw_only=True)
class ShapeGroup:
    """Images of one shape, contiguous in their batch.

    Attributes:
        first: number of the first one among all samples that training sees.
        images: float32 in [-1, 1], (n, C, H, W); (n, 0, H, W) where latents are all that training
            needs.
        context: what conditioners may read, by name, n of each: see `Dataset.context`; and
            "augmentation", what the non-leaking
            pipeline did, (n, 0 or 9).
        moments: of their latents, (n, 2 c, h, w), where these were made ahead.
    """

    first: int
    images: Tensor
    context: Mapping[str, Any]
    moments: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The input of a training step, or the share of it that one of several processes trains on:
    groups of one shape each, and the images that could not be read and were replaced.

    Attributes:
        first: number of the first sample of the step, of all processes.
        size: the number of its samples, of all processes.
    """

    groups: Sequence[ShapeGroup]
    first: int
    size: int
    bad: Sequence[Reject] = ()

    def __len__(self) -> int:
        return sum(len(group) for group in self.groups)


def to_float(pixels: Tensor) -> Tensor:
    """Convert uint8 from 0 to 255, or uint16 from 0 to 65535, to float32 from -1 to 1."""
    return pixels.to(torch.float32).div_(127.5 if pixels.dtype == torch.uint8 else 32767.5).sub_(1)


class _Batches(TorchDataset[Batch]):
    """The share of one of several processes in the batches of the plan by step, as a worker process
    computes it.
    """

    def __init__(self, dataset: Dataset, plan: BatchPlan, rank: int, ranks: int) -> None:
        self.dataset, self.plan, self.rank, self.ranks = dataset, plan, rank, ranks

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "signs": known_signs()}  # of a process that is not forked

    def __setstate__(self, state: dict[str, Any]) -> None:
        note_signs(state.pop("signs"))
        self.__dict__.update(state)

    def __getitem__(self, step: int) -> Batch:
        positions = self.dataset.epoch[self.plan.batch(step, rank=self.rank, ranks=self.ranks)]
        first = step * self.plan.batch_size + self.rank * len(positions)
        groups: list[ShapeGroup] = []
        bad: list[Reject] = []
        read = self._images if self.dataset.latents is None else self._latents
        draws = randomness.uniform(self.plan.seed, "caption", first=first, count=len(positions))[
            :, 0
        ].tolist()
        for begin, end in _runs_of_one_shape(self.dataset.shapes[positions]):
            samples = read(positions[begin:end], first + begin)
            context = self.dataset.context(samples.positions, draws=draws[begin:end])
            annotations = {name: context[name] for name in SPATIAL_ANNOTATIONS if name in context}
            augmented = augment(
                self.dataset.config.augment, samples.images, samples.draws, annotations=annotations
            )
            context |= {**augmented.annotations, "augmentation": augmented.labels}
            groups.append(
                ShapeGroup(
                    first=first + begin,
                    images=augmented.images,
                    context=context,
                    moments=samples.moments,
                )
            )
            bad += samples.bad
        return Batch(
            groups=groups,
            first=step * self.plan.batch_size,
            size=self.plan.batch_size,
            bad=bad,
        )

    def _images(self, positions: NDArray[np.int64], first: int) -> _Samples:
        """Read pixels, to be augmented in a new way each time they are seen."""
        pixels, bad, positions = self.dataset.images(positions)
        draws = augmentation_draws(self.plan.seed, first=first, count=len(positions))
        return _Samples(to_float(pixels), positions, draws, None, bad)

    def _latents(self, positions: NDArray[np.int64], first: int) -> _Samples:
        """Read latents of one variant of each image, and pixels to augment as it was."""
        latents = self.dataset.latents
        assert latents is not None
        height, width = self.dataset.config.pixel_format().shapes[self.dataset.shapes[positions[0]]]
        images = torch.empty(len(positions), 0, height, width)
        bad: Sequence[Reject] = []
        if latents.pixels:
            pixels, bad, positions = self.dataset.images(positions)
            images = to_float(pixels)
        chances = randomness.uniform(self.plan.seed, "variant", first=first, count=len(positions))[
            :, 0
        ]
        variants = (chances * latents.variants).long().numpy()
        moments = torch.from_numpy(
            latents.read_rows(latents.numbers[positions] * latents.variants + variants)
        ).float()
        draws = torch.cat(
            [
                variant_draws(self.dataset.ids[p], int(v))
                for p, v in zip(positions, variants, strict=True)
            ]
        )
        return _Samples(images, positions, draws, moments, bad)


class _Samples(NamedTuple):
    """What was read of some images, before augmentation, and the draws that decide on it."""

    images: Tensor
    positions: NDArray[np.int64]
    draws: Tensor
    moments: Tensor | None
    bad: Sequence[Reject]


def variant_draws(id_: str, variant: int) -> Tensor:
    """Return the draws (1, 24) that decide how a variant of an image is augmented.

    They are a function of its content, so that latents may be kept.
    """
    return augmentation_draws(id_, first=variant, count=1)


def _runs_of_one_shape(shapes: NDArray[np.integer]) -> Iterator[tuple[int, int]]:
    """Yield where each run of equal shapes begins and ends."""
    begin = 0
    for _, run in groupby(shapes.tolist()):
        end = begin + sum(1 for _ in run)
        yield begin, end
        begin = end


def batches(
    dataset: Dataset, plan: BatchPlan, *, start: int, rank: int = 0, ranks: int = 1
) -> Iterator[Batch]:
    """Return an iterator of one process's share of the training batches `start`, `start + 1`, ...
    without end.

    They are the same for any number of workers. Where processes read ahead, `next` raises a
    RuntimeError "timed out" after TIMEOUT_S without a batch, and may be called again.
    """
    workers = dataset.config.workers if dataset.decodes_on_use else 0
    loader: DataLoader[Batch] = DataLoader(
        _Batches(dataset, plan, rank, ranks),
        batch_size=None,
        sampler=_CountFrom(start),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        timeout=TIMEOUT_S if workers else 0,
        collate_fn=_identity,
        worker_init_fn=die_with_parent if workers else None,
    )
    iterator: Iterator[Batch] = iter(loader)
    main_thread = threading.current_thread() is threading.main_thread()
    if workers and main_thread and hasattr(signal, "SIGCHLD"):
        # torch's handler raises in the middle of a step; a worker that has died is noticed when its
        # batch does not come
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return iterator


def _identity(batch: Any) -> Any:
    """Return the batch as it is: a step is a batch already, and needs no collation."""
    return batch


class _CountFrom:
    """An endless sampler: start, start + 1, ..."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        step = self.start
        while True:
            yield step
            step += 1

    def __len__(self) -> int:
        return 2**62
