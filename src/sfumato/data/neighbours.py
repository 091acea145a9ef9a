"""Nearest neighbours of points in a few dimensions, at a cost that grows with their number and no faster."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MOST_EXACT = 20_000  # points that are searched exactly
CELL = 512  # points of a cell, on average
PROBES = 8  # cells around a point that are searched for its neighbours
PRODUCTS = 1 << 23  # that are computed at once
AT_ONCE = 8192  # points that are assigned to cells at once


def nearest_points(
    points: NDArray[np.float32], queries: NDArray[np.int64], count: int
) -> NDArray[np.int64]:
    """Return the `count` nearest of points (n, d) to those at `queries`, themselves among them, (q, count).

    Above MOST_EXACT points, those in the PROBES cells around each one, nearest first; its own number takes
    the place of any that these do not have. A near-duplicate is missed only if it lies in none of them.

    Source of the cells: Jégou et al. 2011, "Product quantization for nearest neighbor search" (the inverted
    file, with points of the set as centres).
    """
    if len(points) > MOST_EXACT:
        return _by_cells(torch.from_numpy(points), torch.from_numpy(queries), count).numpy()
    from scipy.spatial import cKDTree

    found: NDArray[np.int64] = cKDTree(points).query(points[queries], k=count, workers=-1)[1]
    return found.reshape(len(queries), count)


def _by_cells(points: Tensor, queries: Tensor, count: int) -> Tensor:
    """Return the nearest points to those at `queries`, (q, count), cell by cell."""
    cells = -(-len(points) // CELL)
    centres = points[torch.arange(cells) * len(points) // cells]
    members, starts = _grouped(_nearest_cells(points, centres, 1), cells)
    asking, first = _grouped(_nearest_cells(points[queries], centres, PROBES), cells)
    squares = points.square().sum(1)
    distances = torch.full((len(queries), count), torch.inf)
    nearest = queries[:, None].repeat(1, count)
    for cell in range(cells):
        inside = members[starts[cell] : starts[cell + 1]]
        if not len(inside):
            continue
        # points that coincide are all in one cell, which may be large
        for rows in asking[first[cell] : first[cell + 1]].split(max(1, PRODUCTS // len(inside))):
            products = points[queries[rows]] @ points[inside].T
            new = squares[queries[rows], None] + squares[inside] - 2 * products
            best = new.topk(min(count, len(inside)), largest=False)
            both = torch.cat([distances[rows], best.values], 1).topk(count, largest=False)
            known = torch.cat([nearest[rows], inside[best.indices]], 1)
            distances[rows], nearest[rows] = both.values, known.gather(1, both.indices)
    return nearest


def _nearest_cells(points: Tensor, centres: Tensor, count: int) -> Tensor:
    """Return the cells whose centres are the nearest to each point, (n, count)."""
    half = centres.square().sum(1) / 2
    count = min(count, len(centres))
    return torch.cat(
        [
            (half - part @ centres.T).topk(count, largest=False).indices
            for part in points.split(AT_ONCE)
        ]
    )


def _grouped(cells: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the rows of `cells` (n, k) in the order of their cells, and where each cell begins."""
    flat = cells.reshape(-1)
    order = flat.argsort(stable=True)
    starts = torch.searchsorted(flat[order], torch.arange(count + 1))
    return order // cells.shape[1], starts
