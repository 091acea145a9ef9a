"""Outlines of SVG images as points: paths, arcs, shapes and transforms, flattened to polylines.

Knows what OpenMoji's images consist of, not all of SVG: no styles, clips, text or references.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray


def has_lines(svg: ElementTree.Element) -> bool:
    """Return whether any dark shape is visible."""
    return next(_lines(svg, np.eye(3), "#000", "none"), None) is not None


def outline(svg: ElementTree.Element, count: int) -> NDArray[np.float32]:
    """Return `count` points (count, 2) at even distances along all lines.

    x points right and y up; the canvas is from -1 to 1.
    """
    left, top, width, height = map(float, svg.get("viewBox", "").split())
    lines = list(_lines(svg, np.eye(3), "#000", "none"))
    start, end = (
        np.concatenate([line[part] for line in lines]) for part in (slice(None, -1), slice(1, None))
    )
    lengths = np.abs(end - start)
    reached = np.cumsum(lengths)
    distances = (np.arange(count) + 0.5) / count * reached[-1]
    piece = np.searchsorted(reached, distances)
    points = end[piece] - (end - start)[piece] * ((reached[piece] - distances) / lengths[piece])
    return np.stack(
        [(points.real - left) / width * 2 - 1, 1 - (points.imag - top) / height * 2], axis=1
    ).astype(np.float32)


def _lines(
    element: ElementTree.Element, matrix: NDArray[Any], fill: str, stroke: str
) -> Iterator[NDArray[Any]]:
    """Yield the outlines of all visible dark shapes, in the root's coordinates.

    `matrix`, `fill` and `stroke` are inherited from the parent.
    """
    matrix = matrix @ _matrix(element.get("transform", ""))
    fill, stroke = element.get("fill", fill), element.get("stroke", stroke)
    shape = SHAPES[element.tag.rpartition("}")[2]]
    if shape is not None and not {fill, stroke} <= {"none", "#fff"}:
        across, down, shift = matrix[0] + 1j * matrix[1]
        yield from (
            across * line.real + down * line.imag + shift for line in _flatten(shape(element))
        )
    for child in element:
        yield from _lines(child, matrix, fill, stroke)


def _matrix(text: str) -> NDArray[Any]:
    """Return the (3, 3) matrix of a `transform` attribute."""
    product = np.eye(3)
    for name, numbers in re.findall(r"(\w+)\s*\(([^)]*)\)", text):
        n = [float(number) for number in _NUMBER.findall(numbers)]
        if name == "translate":
            n = [1, 0, 0, 1, *n, 0]
        elif name == "scale":
            n = [n[0], 0, 0, n[-1], 0, 0]
        elif name == "rotate":
            turn = np.exp(1j * np.radians(n[0]))
            shift = complex(*n[1:]) * (1 - turn)
            n = [turn.real, turn.imag, -turn.imag, turn.real, shift.real, shift.imag]
        product = product @ np.array([n[0:5:2], n[1:6:2], [0, 0, 1]])
    return product


def _ellipse_path(element: ElementTree.Element) -> str:
    """Return the path of a rectangle, circle or ellipse.

    An ellipse is a rounded rectangle that consists of its corners only.
    """
    rx, ry = (
        float(element.get("r") or element.get(a) or element.get(b) or 0)
        for a, b in (("rx", "ry"), ("ry", "rx"))
    )
    x, y, width, height = (
        float(element.get("cx", 0)) - rx,
        float(element.get("cy", 0)) - ry,
        2 * rx,
        2 * ry,
    )
    if element.tag.endswith("rect"):
        x, y, width, height = (
            float(element.get(name, 0)) for name in ("x", "y", "width", "height")
        )
        rx, ry = min(rx, width / 2), min(ry, height / 2)
    across, down, arc = width - 2 * rx, height - 2 * ry, f"a{rx} {ry} 0 0 1"
    return f"M{x + rx} {y}h{across}{arc} {rx} {ry}v{down}{arc} {-rx} {ry}h{-across}{arc} {-rx} {-ry}v{-down}{arc} {rx} {-ry}Z"


# Shapes as paths; what only holds shapes is none itself.
SHAPES: dict[str, Any] = {
    "svg": None,
    "g": None,
    "circle": _ellipse_path,
    "ellipse": _ellipse_path,
    "rect": _ellipse_path,
    "path": lambda element: element.get("d", ""),
    "line": lambda element: "M{} {}L{} {}".format(
        *(element.get(name, 0) for name in ("x1", "y1", "x2", "y2"))
    ),
    "polyline": lambda element: f"M{element.get('points', '')}",
    "polygon": lambda element: f"M{element.get('points', '')}Z",
}
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_FLAGS = re.compile(
    r"((?:N[\s,]*){3})([01])[\s,]*([01])[\s,]*((?:N[\s,]*){2})".replace("N", _NUMBER.pattern)
)  # may touch
_COMMAND = re.compile(r"([MmLlHhVvCcSsQqTtAaZz])([^MmLlHhVvCcSsQqTtAaZz]*)")
_COUNTS = {"M": 2, "L": 2, "H": 1, "V": 1, "C": 6, "S": 4, "Q": 4, "T": 2, "A": 7}
_STEPS = np.linspace(0, 1, 17)[1:]  # of a curve


def _flatten(path: str) -> Iterator[NDArray[Any]]:
    """Yield the parts of an SVG path as polylines."""
    lines: list[list[complex]] = []
    here = start = cubic = quadratic = 0j  # the last two: control points that S and T mirror
    for command, text in _COMMAND.findall(path):
        kind = command.upper()
        count = _COUNTS.get(kind, 1)
        numbers = [
            float(number)
            for number in _NUMBER.findall(_FLAGS.sub(r"\1 \2 \3 \4", text) if kind == "A" else text)
        ]
        if kind == "Z":
            lines[-1].append(start)
            lines.append([start])
            here = cubic = quadratic = start
        for first in range(0, len(numbers), count):
            n = numbers[first : first + count]
            origin = here if command.islower() else 0j
            if kind in "HV":
                n.insert(kind == "H", (here - origin).imag if kind == "H" else (here - origin).real)
            points = [complex(x, y) + origin for x, y in zip(n[-2::-2], n[::-2], strict=False)][
                ::-1
            ]
            if kind in "ST":
                points = [2 * here - (cubic if kind == "S" else quadratic), *points]
            if kind == "M" and first == 0:
                lines.append(points)
                start = points[0]
            elif kind == "A":
                lines[-1] += _arc(here, points[-1], *n[:5])
            else:
                # a line, or a Bezier curve of any degree, by de Casteljau
                level: list[Any] = [here, *points]
                while len(level) > 1:
                    level = [a + (b - a) * _STEPS for a, b in pairwise(level)]
                lines[-1] += list(level[0])
            here = points[-1]
            cubic = points[-2] if kind in "CS" else here
            quadratic = points[-2] if kind in "QT" else here
    yield from (np.array(line) for line in lines if len(line) > 1)


def _arc(
    start: complex, end: complex, rx: float, ry: float, degrees: float, large: float, sweep: float
) -> list[complex]:
    """Return points on an elliptic arc, which is rotated and scaled to the unit circle."""
    if not rx or not ry or start == end:
        return [end]
    turn = np.exp(1j * np.radians(degrees))
    a, b = (complex((z / turn).real / abs(rx), (z / turn).imag / abs(ry)) for z in (start, end))
    half = (b - a) / 2
    # 0: an ellipse too small, enlarged
    aside = np.sqrt(max(0.0, 1 / abs(half) ** 2 - 1)) * (1 if large != sweep else -1)
    centre = (a + b) / 2 + 1j * half * aside
    angle = np.angle((b - centre) / (a - centre)) % (2 * np.pi) - (0 if sweep else 2 * np.pi)
    circle = centre + (a - centre) * np.exp(1j * angle * _STEPS)
    return list((circle.real * abs(rx) + 1j * circle.imag * abs(ry)) * turn)
