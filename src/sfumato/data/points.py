"""Decoding of untrusted point clouds: .npy, .ply (ascii and binary), .xyz and .csv, distinguished
by content.
"""

from __future__ import annotations

import io
from array import array
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sfumato.data.file_types import NUMPY
from sfumato.data.listing import MAX_BYTES
from sfumato.data.npy import ArrayHeader

MAX_POINTS = 10_000_000
MAX_DIMENSIONS = 16
MAX_HEADER_BYTES = 1 << 16
MAX_POINTS_READ = 2048  # points of a larger cloud, evenly chosen
Cloud = NDArray[np.float32]  # (N, D): coordinates, then features

_PLY_TYPES = {
    "char": "i1",
    "int8": "i1",
    "uchar": "u1",
    "uint8": "u1",
    "short": "i2",
    "int16": "i2",
    "ushort": "u2",
    "uint16": "u2",
    "int": "i4",
    "int32": "i4",
    "uint": "u4",
    "uint32": "u4",
    "float": "f4",
    "float32": "f4",
    "double": "f8",
    "float64": "f8",
}
_PLY_FORMATS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}


class RejectedPoints(Exception):
    """A point cloud that cannot be used; the message is the reason."""


def read_points(data: bytes) -> Cloud:
    """Decode a point cloud (N, D) in the order of the file, at most MAX_POINTS_READ points of it.

    Raises:
        RejectedPoints: with the reason.
    """
    if len(data) > MAX_BYTES:
        raise RejectedPoints(f"more than {MAX_BYTES >> 20} MiB")
    try:
        if data.startswith(NUMPY):
            points = _array(data)
        elif data.startswith(b"ply"):
            points = _ply(data)
        else:
            points = _text(data)
    except RejectedPoints:
        raise
    except Exception as error:  # whatever numpy raises on damaged bytes
        raise RejectedPoints(f"damaged: {str(error) or type(error).__name__}"[:200]) from None
    return subsample(_check(points))


def subsample(points: Cloud) -> Cloud:
    """Return at most MAX_POINTS_READ of the points, spread evenly over the file."""
    if len(points) <= MAX_POINTS_READ:
        return points
    return points[np.linspace(0, len(points) - 1, MAX_POINTS_READ).round().astype(np.int64)]


def _check(points: NDArray[Any]) -> Cloud:
    if points.ndim != 2 or not 2 <= points.shape[1] <= MAX_DIMENSIONS:
        raise RejectedPoints(
            f"an array of {points.shape}; a cloud is N x 2 or N x 3, plus feature columns"
        )
    if not len(points):
        raise RejectedPoints("no points")
    with np.errstate(over="ignore"):
        points = points.astype(np.float32)
    bad = ~np.isfinite(points).all(1)
    if bad.any():
        raise RejectedPoints(
            f"{bad.sum()} of {len(points)} points are not finite, first number {int(bad.argmax())}"
        )
    return points


def _array(data: bytes) -> NDArray[Any]:
    shape, dtype, fortran, offset = ArrayHeader.of(data)
    if dtype.kind not in "fiu" or len(shape) != 2:
        raise RejectedPoints(
            f"an array of {dtype} {shape}; a cloud is N x 2 or N x 3 of plain numbers"
        )
    _check_count(shape[0])
    values = np.frombuffer(data, dtype, offset=offset)
    if values.size != shape[0] * shape[1]:
        raise RejectedPoints("damaged: the array is cut short")
    return values.reshape(shape, order="F" if fortran else "C")


def _check_count(count: int) -> None:
    if not 0 <= count <= MAX_POINTS:
        raise RejectedPoints(f"{count} points, more than {MAX_POINTS}")


class _Header(NamedTuple):
    """The header of a .ply: numpy's character for the byte order, "" for text; the number of
    vertices; their properties and the numpy types of these.
    """

    order: str
    vertices: int
    names: list[str]
    types: list[str]

    @property
    def columns(self) -> list[int]:
        """The positions of x, y and z, then of the other properties."""
        first = [self.names.index(name) for name in ("x", "y", "z") if name in self.names]
        return [*first, *(place for place in range(len(self.names)) if place not in first)]


def _ply(data: bytes) -> NDArray[Any]:
    """Read x, y and z, then the other scalar properties of the vertices.

    Elements after the vertices are not read.
    """
    text, end, _ = data[:MAX_HEADER_BYTES].partition(b"\nend_header")
    start = data.find(b"\n", len(text) + 1) + 1
    if not end or not start:
        raise RejectedPoints("damaged: the header has no end")
    header = _header(text.decode("ascii", "replace"))
    _check_count(header.vertices)
    if not header.order:
        return _ascii(data, start, header)[:, header.columns]
    row = np.dtype([(f"p{i}", header.order + type_) for i, type_ in enumerate(header.types)])
    if len(data) - start < header.vertices * row.itemsize:
        raise RejectedPoints("damaged: cut short")
    table = np.frombuffer(data, row, count=header.vertices, offset=start)
    return np.stack([table[f"p{place}"].astype(np.float64) for place in header.columns], axis=1)


def _header(text: str) -> _Header:
    order, count, names, types = None, -1, [], []
    element = ""
    for line in text.splitlines():
        match line.split():
            case ["format", name, _] if name in _PLY_FORMATS:
                order = _PLY_FORMATS[name]
            case ["element", element, number]:
                if count < 0 and element != "vertex":
                    raise RejectedPoints("elements before the vertices")
                count = int(number) if element == "vertex" else count
            case ["property", kind, *fields] if element == "vertex":
                if kind not in _PLY_TYPES or len(fields) != 1:
                    raise RejectedPoints(
                        "vertices with lists"
                        if kind == "list"
                        else f"a property of no known type: {line[:40]!r}"
                    )
                names.append(fields[0])
                types.append(_PLY_TYPES[kind])
    if order is None or "x" not in names or "y" not in names:
        raise RejectedPoints("no vertices with x and y in a known format")
    if len(names) > MAX_DIMENSIONS:
        raise RejectedPoints(f"{len(names)} properties, more than {MAX_DIMENSIONS}")
    return _Header(order, count, names, types)


def _ascii(data: bytes, start: int, header: _Header) -> NDArray[Any]:
    width, values = len(header.names), array("d")
    lines = io.BytesIO(data)
    lines.seek(start)
    for line in islice(lines, header.vertices):
        words = line.split(maxsplit=width)
        if len(words) < width:
            break
        values.extend(map(float, words[:width]))
    if len(values) < header.vertices * width:
        raise RejectedPoints("damaged: cut short")
    return np.array(values).reshape(header.vertices, width)


def _text(data: bytes) -> NDArray[Any]:
    """Read lines of numbers, separated by commas, semicolons or blanks.

    Comments, and lines of words above the numbers, are skipped.
    """
    width, values = 0, array("d")
    for number, line in enumerate(io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig"), 1):
        words = (
            line.partition("#")[0]
            .replace(",", " ")
            .replace(";", " ")
            .split(maxsplit=MAX_DIMENSIONS)
        )
        if not words:
            continue
        try:
            row = [float(word) for word in words[:MAX_DIMENSIONS]]
        except ValueError:
            if not values:
                continue
            raise RejectedPoints(f"line {number} is not numbers: {line[:40]!r}") from None
        if len(words) > MAX_DIMENSIONS:
            raise RejectedPoints(f"line {number} has more than {MAX_DIMENSIONS} numbers")
        if values and len(row) != width:
            raise RejectedPoints("lines of different lengths")
        width = len(row)
        values.extend(row)
        _check_count(len(values) // width)
    if not values:
        raise RejectedPoints("no points")
    return np.array(values).reshape(-1, width)
