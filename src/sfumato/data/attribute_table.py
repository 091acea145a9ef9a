"""The attributes of a set: few numbers for each image out of many possible ones, kept sparsely."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.data.listing import Entry

MAX_ATTRIBUTES_READ = 1024  # attributes that are read: the network has two inputs for each


@dataclass(frozen=True, kw_only=True)
class AttributeTable:
    """Known attributes, row by row.

    Attributes:
        names: of the attributes that are read, sorted.
        starts: where the values of image i begin, (N + 1,).
        columns, values: index into `names`, and the number.
        labels: whether an attribute is never anything but 1, and so 0 where it is not given, (D,).
        left_out: how many rarer attributes are not read.
    """

    names: tuple[str, ...]
    starts: NDArray[np.int64]
    columns: NDArray[np.int64]
    values: NDArray[np.float32]
    labels: NDArray[np.bool_]
    left_out: int

    @classmethod
    def of(cls, entries: Sequence[Entry], *, most: int = MAX_ATTRIBUTES_READ) -> AttributeTable:
        """Collect the attributes of images; of more than `most`, keep the most frequent."""
        times = Counter(name for entry in entries for name, _ in entry.attributes)
        names = tuple(sorted(sorted(times, key=lambda name: (-times[name], name))[:most]))
        numbers = {name: number for number, name in enumerate(names)}
        pairs = [
            [(numbers[name], value) for name, value in entry.attributes if name in numbers]
            for entry in entries
        ]
        starts = np.concatenate(
            [[0], np.cumsum([len(row) for row in pairs], dtype=np.int64)]
        ).astype(np.int64)
        columns = np.array([column for row in pairs for column, _ in row], np.int64)
        values = np.array([value for row in pairs for _, value in row], np.float32)
        labels = np.ones(len(names), bool)
        labels[columns[values != 1]] = False
        return cls(
            names=names,
            starts=starts,
            columns=columns,
            values=values,
            labels=labels,
            left_out=len(times) - len(names),
        )

    def rows(self, positions: NDArray[np.int64]) -> Tensor:
        """Return the attributes (n, D) of the images at `positions`.

        What is not given is NaN, or 0 for a label.
        """
        empty = np.where(self.labels, np.float32(0), np.float32(np.nan))
        table = np.repeat(empty[None], len(positions), axis=0)
        for row, position in enumerate(positions.tolist()):
            chosen = slice(self.starts[position], self.starts[position + 1])
            table[row, self.columns[chosen]] = self.values[chosen]
        return torch.from_numpy(table)

    def moments(self, positions: NDArray[np.int64]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the mean and standard deviation of each attribute over the images at `positions`.

        Only images that have the attribute count, and NaN is returned where none has; a label
        counts as 0 where it is not given.
        """
        size = len(self.names)
        owners = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))
        chosen = np.isin(owners, positions)
        columns, values = self.columns[chosen], self.values[chosen].astype(np.float64)
        present = np.bincount(columns, minlength=size)
        count = np.where(self.labels, len(positions), present)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.bincount(columns, values, minlength=size) / count
            squares = np.bincount(columns, (values - mean[columns]) ** 2, minlength=size)
            deviation = np.sqrt(
                (squares + (count - present) * np.where(self.labels, mean, 0) ** 2) / count
            )
        return tuple(mean.tolist()), tuple(deviation.tolist())
