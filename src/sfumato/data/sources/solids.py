"""Solids seen by a camera: superquadrics in six shapes and eight colours, with points on their
surface.
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass, replace
from functools import partial
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfumato.config.bounds import Count, Size
from sfumato.data.listing import Listing, Source
from sfumato.data.parallel import ordered_map
from sfumato.data.sources.generated import build_once
from sfumato.data.sources.webdataset import WebDataset
from sfumato.errors import DataError
from sfumato.observability.progress import ProgressBar

SHAPES = {
    "ball": (1.0, 1.0),
    "box": (0.15, 0.15),
    "cylinder": (0.15, 1.0),
    "diamond": (2.0, 2.0),
    "spindle": (2.0, 1.0),
    "cushion": (1.0, 0.15),
}  # exponents e1 (along the axis) and e2 (around it)
COLOURS = {
    "red": (0.85, 0.16, 0.14),
    "orange": (0.95, 0.55, 0.10),
    "yellow": (0.96, 0.86, 0.20),
    "green": (0.20, 0.62, 0.25),
    "blue": (0.15, 0.35, 0.80),
    "purple": (0.50, 0.22, 0.65),
    "white": (0.93, 0.93, 0.93),
    "gray": (0.42, 0.42, 0.45),
}
HELD_OUT = {
    ("ball", "green"),
    ("box", "purple"),
    ("cylinder", "red"),
    ("diamond", "blue"),
    ("spindle", "yellow"),
}
POINTS = 512  # on each surface
DISTANCE, FOCUS = (
    4.0,
    3.2,
)  # of the camera, in units of the largest half axis; the image's half side is 1/FOCUS of the distance
_LIGHT = np.array([-0.45, 0.65, 0.62])
_STEPS, _HALVINGS, _FINER = 32, 10, 2
_FORM = 1  # raised when code below changes what is rendered

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Solids(Source):
    """Superquadrics, each with one caption ("a red box"), its shape as category, and 512 surface
    points in the camera's frame.

    Points are x right, y up, z towards the camera, scaled so that the image spans x and y from -1
    to 1 at the solid's depth.
    Rendered once into the cache.

    Attributes:
        count: how many.
        size: side of the images in pixels.
        holdout: pairs of shape and colour kept from training, five of forty-eight by default.
    """

    count: Count = 3000
    size: Size = 64
    holdout: Literal["shape x colour", "none"] = "shape x colour"

    def listing(self) -> Listing:
        """List the solids; the first call renders them into the cache.

        Raises:
            DataError: if `count` is not from 1 to 100,000, or `size` not from 8 to 1024.
        """
        if not 1 <= self.count <= 100_000 or not 8 <= self.size <= 1024:
            raise DataError(
                f"{self.count} solids of {self.size} pixels",
                where="solids",
                hint="count to 100,000, size from 8 to 1024",
            )
        place = build_once(
            "solids",
            f"form{_FORM}_{self.count}_{self.size}px.tar",
            partial(_write, count=self.count, size=self.size),
        )
        listing = WebDataset(str(place)).listing()
        if self.holdout == "none":
            return listing
        held = {f"a {colour} {shape}" for shape, colour in HELD_OUT}
        entries = [
            replace(entry, holdout=self.holdout) if entry.captions[0] in held else entry
            for entry in listing.entries
        ]
        return replace(listing, entries=entries)


@dataclass(frozen=True, kw_only=True)
class Solid:
    """One superquadric.

    |x/a|^(2/e2) + |y/b|^(2/e2) raised to e2/e1, plus |z/c|^(2/e1), is 1 on its surface.

    Source: Barr 1981, "Superquadrics and angle-preserving transformations", IEEE CG&A 1(1).

    Attributes:
        exponents: e1, e2; axes: a, b, c; turn: (3, 3) rotation from its own frame to the camera's;
            colour: RGB in [0, 1].
    """

    exponents: tuple[float, float]
    axes: Array
    turn: Array
    colour: Array

    @classmethod
    def draw(cls, rng: np.random.Generator, shape: str, colour: str) -> Solid:
        """Draw random proportions, a random orientation, and a shade of the colour."""
        q = rng.normal(size=4)
        w, x, y, z = q / np.linalg.norm(q)
        turn = np.array(
            [
                [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
            ]
        )
        axes = rng.uniform(0.45, 0.8, 3)
        shade = np.array(COLOURS[colour]) * rng.uniform(0.92, 1.05)
        return cls(exponents=SHAPES[shape], axes=axes, turn=turn, colour=shade.clip(0, 1))

    def inside(self, points: Array) -> Array:
        """Evaluate the implicit function at points (..., 3) in the camera's frame.

        It is below 1 inside, and above 1 outside.
        """
        e1, e2 = self.exponents
        x, y, z = np.moveaxis(np.abs(points @ self.turn / self.axes) + 1e-9, -1, 0)
        result: Array = (x ** (2 / e2) + y ** (2 / e2)) ** (e2 / e1) + z ** (2 / e1)
        return result

    def surface(self, rng: np.random.Generator, count: int) -> Array:
        """Sample points (count, 3) on the surface, spread about evenly.

        They lie on rays from the centre, weighted by the area that each ray covers.
        """
        rays = rng.normal(size=(16 * count, 3))
        rays /= np.linalg.norm(rays, axis=1, keepdims=True)
        low, high = np.zeros(len(rays)), np.full(len(rays), 2.0)
        for _ in range(25):
            middle = (low + high) / 2
            outside = self.inside(rays * middle[:, None]) > 1
            low, high = np.where(outside, low, middle), np.where(outside, middle, high)
        points = rays * high[:, None]
        slant = np.abs((rays * self.normals(points)).sum(1)).clip(0.05)
        weight = high**2 / slant
        result: Array = points[
            rng.choice(len(points), count, replace=False, p=weight / weight.sum())
        ]
        return result

    def normals(self, points: Array) -> Array:
        """Return outward unit normals at points of the surface, by central differences."""
        steps = 1e-4 * np.eye(3)
        slope = np.stack(
            [self.inside(points + step) - self.inside(points - step) for step in steps], axis=-1
        )
        result: Array = slope / np.linalg.norm(slope, axis=-1, keepdims=True).clip(1e-12)
        return result

    def render(self, size: int) -> NDArray[np.uint8]:
        """Render the image, (size, size, 3)."""
        fine = size * _FINER
        place = (np.arange(fine) + 0.5) / fine * 2 - 1
        x, y = np.meshgrid(place, -place)
        rays = np.stack([x / FOCUS, y / FOCUS, -np.ones_like(x)], axis=-1)
        rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
        camera = np.array([0.0, 0.0, DISTANCE])
        image = np.repeat((0.98 - 0.10 * (place + 1) / 2)[:, None, None], fine, axis=1).repeat(
            3, axis=2
        )
        # rays that pass the solid's ball
        near = np.linalg.norm(np.cross(rays, -camera), axis=-1) < np.linalg.norm(self.axes)
        hit, points = self._intersect(camera, rays[near])
        lit = image[near]
        lit[hit] = self._shade(points, camera)
        image[near] = lit
        averaged = image.reshape(size, _FINER, size, _FINER, 3).mean((1, 3))
        result: NDArray[np.uint8] = (averaged.clip(0, 1) * 255).round().astype(np.uint8)
        return result

    def _intersect(self, camera: Array, rays: Array) -> tuple[NDArray[np.bool_], Array]:
        """Return which rays meet the surface, and where they first do."""
        reach = float(np.linalg.norm(self.axes))
        steps = np.linspace(DISTANCE - reach, DISTANCE + reach, _STEPS)
        outside = np.stack([self.inside(camera + rays * step) > 1 for step in steps])
        hit: NDArray[np.bool_] = np.asarray(~outside.all(0))
        first = (~outside).argmax(0)[hit]
        rays = rays[hit]
        high, low = steps[first], steps[np.maximum(first - 1, 0)]
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            out = self.inside(camera + rays * middle[:, None]) > 1
            low, high = np.where(out, middle, low), np.where(out, high, middle)
        return hit, camera + rays * high[:, None]

    def _shade(self, points: Array, camera: Array) -> Array:
        """Return colours (n, 3): ambient, diffuse and a highlight (Blinn-Phong)."""
        normals = self.normals(points)
        light = _LIGHT / np.linalg.norm(_LIGHT)
        towards = camera - points
        half = light + towards / np.linalg.norm(towards, axis=1, keepdims=True)
        half /= np.linalg.norm(half, axis=1, keepdims=True)
        diffuse = (normals @ light).clip(0)[:, None]
        shine = ((normals * half).sum(1).clip(0) ** 40)[:, None]
        result: Array = self.colour * (0.35 + 0.65 * diffuse) + 0.25 * shine
        return result


def _write(file: BinaryIO, *, count: int, size: int) -> None:
    """Render the first `count` solids into a tar; solid i is the same whatever the count."""
    with (
        ProgressBar("solids") as bar,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for number, members in enumerate(ordered_map(partial(_members, size=size), range(count))):
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            bar.update((number + 1) / count, f"{number + 1:,} of {count:,} solids")


def _members(number: int, *, size: int) -> dict[str, bytes]:
    rng = np.random.Generator(np.random.Philox(key=[20260, number]))
    shape, colour = (
        list(SHAPES)[number % len(SHAPES)],
        list(COLOURS)[number // len(SHAPES) % len(COLOURS)],
    )
    solid = Solid.draw(rng, shape, colour)
    note = {"captions": [f"a {colour} {shape}"], "category": shape}
    image, points = io.BytesIO(), io.BytesIO()
    Image.fromarray(solid.render(size)).save(image, format="PNG")
    np.save(
        points,
        (solid.surface(rng, POINTS) * (FOCUS / DISTANCE)).astype(np.float32),
        allow_pickle=False,
    )
    return {
        "json": json.dumps(note).encode(),
        "png": image.getvalue(),
        "points.npy": points.getvalue(),
    }
