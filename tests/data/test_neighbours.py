"""Neighbours that are looked for in cells are those of an exact search, where they are near."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from sfumato.data import neighbours
from sfumato.data.duplicates import clusters
from sfumato.data.neighbours import nearest_points
from sfumato.data.thumbnails import (
    StoredThumbnails,
    contrast_limits,
    signatures,
    stretch_contrast,
)

COUNT, PLANTED = 2500, 250


@pytest.fixture(scope="module")
def thumbnails() -> NDArray[np.uint8]:
    """Smooth textures, of which some come again with noise, another tone or moved by a pixel."""
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0, 255, (COUNT, 6, 6, 3))
    grid = np.linspace(0, 5, 32)
    low = np.minimum(grid.astype(int), 4)
    share = (grid - low)[:, None, None]
    rows = coarse[:, low] * (1 - share) + coarse[:, low + 1] * share
    share = (grid - low)[:, None]
    images = rows[:, :, low] * (1 - share) + rows[:, :, low + 1] * share
    copies = images[:PLANTED].copy()
    copies[::3] += rng.normal(0, 4, copies[::3].shape)
    copies[1::3] = copies[1::3] * 0.9 + 12
    copies[2::3] = np.roll(copies[2::3], 1, axis=2)
    return np.concatenate([images, copies]).clip(0, 255).astype(np.uint8)


def groups_of(thumbnails: NDArray[np.uint8]) -> NDArray[np.int64]:
    return clusters([f"{i:05d}" for i in range(len(thumbnails))], thumbnails.__getitem__, resolution=32)  # fmt: skip


def together(groups: NDArray[np.int64]) -> float:
    """The share of planted copies that are in the group of their original."""
    return float((groups[:PLANTED] == groups[COUNT:]).mean())


def test_copies_are_grouped_as_by_an_exact_search(
    thumbnails: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = groups_of(thumbnails)
    assert together(exact) > 0.9
    monkeypatch.setattr(neighbours, "MOST_EXACT", 0)
    monkeypatch.setattr(neighbours, "CELL", 32)
    cells = groups_of(thumbnails)
    assert together(cells) >= 0.98 * together(exact)
    extra = sum(
        len(set(exact[cells == group])) > 1 for group in np.flatnonzero(np.bincount(cells) > 1)
    )
    assert extra == 0  # no group that the exact search does not have
    assert groups_of(thumbnails).tolist() == cells.tolist()


def test_with_one_cell_more_would_be_missed(
    thumbnails: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    points = signatures(thumbnails)[:, :12]
    queries = np.arange(len(points))
    exact = nearest_points(points, queries, 3)
    monkeypatch.setattr(neighbours, "MOST_EXACT", 0)
    monkeypatch.setattr(neighbours, "CELL", 32)
    found = {}
    for probes in (1, 8):
        monkeypatch.setattr(neighbours, "PROBES", probes)
        nearest = nearest_points(points, queries, 3)
        found[probes] = (nearest == exact).mean()
    assert found[1] < 0.8 < 0.95 < found[8]


@pytest.mark.parametrize(("count", "cell"), [(1, 4), (5, 4), (40, 4), (40, 512), (300, 7)])
def test_sets_of_any_size(count: int, cell: int, monkeypatch: pytest.MonkeyPatch) -> None:
    points = np.random.default_rng(1).normal(size=(count, 3)).astype(np.float32)
    queries = np.arange(count)[::2]
    monkeypatch.setattr(neighbours, "MOST_EXACT", 0)
    monkeypatch.setattr(neighbours, "CELL", cell)
    most = min(4, count)
    found = nearest_points(points, queries, most)
    assert found.shape == (len(queries), most)
    assert (found[:, 0] == queries).all()
    if count <= cell:
        distances = np.linalg.norm(points[queries][:, None] - points, axis=2)
        assert found.tolist() == distances.argsort(1)[:, :most].tolist()


def test_equal_points_are_found_though_they_fill_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "MOST_EXACT", 0)
    monkeypatch.setattr(neighbours, "CELL", 8)
    points = np.zeros((100, 3), np.float32)
    assert nearest_points(points, np.arange(100), 3).shape == (100, 3)
    blank = np.full((60, 32, 32, 3), 128, np.uint8)
    assert len(set(groups_of(blank))) == 1


def test_stored_thumbnails_are_those_of_an_array() -> None:
    images = np.random.default_rng(2).integers(0, 60, (30, 32, 32, 3)).astype(np.uint8)
    stored = StoredThumbnails(images.__getitem__, np.arange(0, 30, 2))
    expected = stretch_contrast(images[::2], contrast_limits(images[::2]))
    assert len(stored) == 15
    assert np.array_equal(stored[:], expected)
    assert np.array_equal(stored[np.array([3, 1])], expected[[3, 1]])
