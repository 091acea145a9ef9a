"""Solids that are made on this machine, held against their own equations."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from sfumato.data import DataConfig, Solids, index, source_at
from sfumato.data.sources import solids
from sfumato.data.sources.solids import COLOURS, DISTANCE, FOCUS, HELD_OUT, SHAPES, Solid
from sfumato.errors import DataError

BALL = Solid(
    exponents=(1.0, 1.0), axes=np.full(3, 0.6), turn=np.eye(3), colour=np.array([1.0, 0.0, 0.0])
)


def some(shape: str) -> Solid:
    return Solid.draw(np.random.default_rng(3), shape, "blue")


@pytest.mark.parametrize("shape", SHAPES)
def test_points_lie_on_the_surface_and_normals_point_outwards(shape: str) -> None:
    solid = some(shape)
    points = solid.surface(np.random.default_rng(0), 200)
    assert solid.inside(points) == pytest.approx(1, abs=1e-3)
    normals = solid.normals(points)
    assert (solid.inside(points + 0.01 * normals) > 1).all()
    assert (solid.inside(points - 0.01 * normals) < 1).mean() > 0.97  # but at edges


def test_points_of_a_ball_are_spread_evenly() -> None:
    points = BALL.surface(np.random.default_rng(0), 4000) / 0.6
    assert np.linalg.norm(points, axis=1) == pytest.approx(1, abs=1e-6)
    assert np.abs(points.mean(0)).max() < 0.04
    # Archimedes: z is uniform
    assert np.histogram(points[:, 2], bins=5, range=(-1, 1))[0] == pytest.approx(800, rel=0.12)


def test_a_ball_is_a_disc_of_the_size_that_the_camera_sees() -> None:
    image = BALL.render(64)
    red = (image[..., 0].astype(int) - image[..., 2]) > 40
    radius = 32 * FOCUS * np.tan(np.arcsin(0.6 / DISTANCE))
    assert np.sqrt(red.sum() / np.pi) == pytest.approx(radius, rel=0.03)
    y, x = np.nonzero(red)
    assert (x.mean(), y.mean()) == pytest.approx((31.5, 31.5), abs=0.3)


@pytest.mark.parametrize("shape", SHAPES)
def test_points_lie_on_the_image_of_their_solid(shape: str) -> None:
    members = solids._members(list(SHAPES).index(shape), size=64)
    points = np.load(io.BytesIO(members["points.npy"])).astype(float)
    with Image.open(io.BytesIO(members["png"])) as image:
        coloured = np.ptp(np.asarray(image).astype(int), axis=2) > 12  # the first six are red
    depth = DISTANCE - points[:, 2] * DISTANCE / FOCUS
    seen = points[:, :2] * (DISTANCE / depth)[:, None]
    column, row = (
        ((seen[:, 0] + 1) * 32).astype(int).clip(0, 63),
        ((1 - seen[:, 1]) * 32).astype(int).clip(0, 63),
    )
    near = coloured.copy()
    for across, down in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        near |= np.roll(coloured, (down, across), (0, 1))
    assert near[row, column].mean() > 0.98
    assert np.ptp(points[:, 2]) > 0.1


def test_they_are_the_same_every_time_and_whatever_the_count() -> None:
    assert solids._members(7, size=16) == solids._members(7, size=16)
    few, more = (
        Solids(count=6, size=16).listing().entries,
        Solids(count=12, size=16).listing().entries,
    )
    assert [entry.image.read() for entry in few] == [entry.image.read() for entry in more[:6]]
    assert [entry.points.read() for entry in few] == [entry.points.read() for entry in more[:6]]


def test_names_say_what_is_shown_and_some_pairs_are_held_out() -> None:
    entries = Solids(count=96, size=16).listing().entries
    assert {entry.category for entry in entries} == set(SHAPES)
    assert {entry.captions[0].split()[1] for entry in entries} == set(COLOURS)
    held = {entry.captions[0] for entry in entries if entry.holdout is not None}
    assert held == {f"a {colour} {shape}" for shape, colour in HELD_OUT}
    assert not any(
        entry.holdout for entry in Solids(count=96, size=16, holdout="none").listing().entries
    )
    note = json.loads(solids._members(0, size=8)["json"])
    assert note == {"captions": ["a red ball"], "category": "ball"}


def test_they_are_a_source_like_any_other() -> None:
    assert source_at("solids") == Solids()
    dataset = index(
        DataConfig(source=Solids(count=60, size=16), resolution=16), annotations=("text", "points")
    )
    context = dataset.context(dataset.training[:3])
    assert context["points"].shape == (3, 512, 3)
    assert len(dataset.named_holdouts["shape x colour"]) > 0
    with pytest.raises(DataError, match="hint"):
        Solids(count=0).listing()
