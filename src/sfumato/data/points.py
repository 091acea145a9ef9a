"""Point clouds from bytes that nobody vouches for: .npy, .ply (ascii and binary), .xyz and .csv, told apart by content."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from sfumato.data.decoding import NUMPY

SUFFIXES = (".npy", ".ply", ".xyz", ".csv")
MAX_POINTS = 10_000_000
MAX_DIMENSIONS = 16
MAX_HEADER_BYTES = 1 << 16
KEPT = 2048  # points of a larger cloud, evenly chosen
Cloud = NDArray[np.float32]  # (N, D): coordinates, then features

_PLY_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2", "uint16": "u2",
    "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip
_PLY_FORMATS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}


class RejectedPoints(Exception):
    """A point cloud that cannot be used; the message is the reason, for a person."""


def read_points(data: bytes) -> Cloud:
    """Points (N, D) of an encoded cloud, in the order of the file; one that is too large is thinned evenly to KEPT points.

    Raises:
        RejectedPoints: with the reason.
    """
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
    return thinned(_checked(points))


def thinned(points: Cloud) -> Cloud:
    """At most KEPT of the points, spread evenly over the file."""
    if len(points) <= KEPT:
        return points
    return points[np.linspace(0, len(points) - 1, KEPT).round().astype(np.int64)]


def _checked(points: NDArray) -> Cloud:
    if points.ndim != 2 or not 2 <= points.shape[1] <= MAX_DIMENSIONS:
        raise RejectedPoints(f"an array of {points.shape}; a cloud is N x 2 or N x 3, features behind")
    if not len(points):
        raise RejectedPoints("no points")
    with np.errstate(over="ignore"):
        points = points.astype(np.float32)
    bad = ~np.isfinite(points).all(1)
    if bad.any():
        raise RejectedPoints(f"{bad.sum()} of {len(points)} points are not finite, first number {int(bad.argmax())}")
    return points


def _array(data: bytes) -> NDArray:
    stream = io.BytesIO(data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise RejectedPoints("an array of an unknown format")
    try:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except MemoryError:  # what Python's parser says to brackets without end
        raise RejectedPoints("damaged: the array's header") from None
    if dtype.kind not in "fiu" or fortran or len(shape) != 2:
        raise RejectedPoints(f"an array of {dtype} {shape}; a cloud is N x 2 or N x 3 of plain numbers")
    _check_count(shape[0])
    values = np.frombuffer(data, dtype, offset=stream.tell())
    if values.size != shape[0] * shape[1]:
        raise RejectedPoints("damaged: the array is cut short")
    return values.reshape(shape)


def _check_count(count: int) -> None:
    if not 0 <= count <= MAX_POINTS:
        raise RejectedPoints(f"{count} points, more than {MAX_POINTS}")


def _ply(data: bytes) -> NDArray:
    """x, y, z first, then the vertices' other scalar properties. Elements after the vertices are not read."""
    header, end, _ = data[:MAX_HEADER_BYTES].partition(b"end_header")
    start = data.find(b"\n", len(header)) + 1
    if not end or not start:
        raise RejectedPoints("damaged: the header has no end")
    order, count, names, types = "", -1, [], []
    element = ""
    for line in header.decode("ascii", "replace").splitlines():
        words = line.split()
        match words:
            case ["format", name, _] if name in _PLY_FORMATS:
                order = name
            case ["element", element, number]:
                if count < 0 and element != "vertex":
                    raise RejectedPoints("elements before the vertices")
                count = int(number) if element == "vertex" else count
            case ["property", "list", *_] if element == "vertex":
                raise RejectedPoints("vertices with lists")
            case ["property", kind, name] if element == "vertex" and kind in _PLY_TYPES:
                names.append(name)
                types.append(_PLY_TYPES[kind])
    if not order or not names or "x" not in names or "y" not in names:
        raise RejectedPoints("no vertices with x and y in a known format")
    _check_count(count)
    first = [name for name in ("x", "y", "z") if name in names]
    columns = [*first, *(name for name in names if name not in first)]
    if order == "ascii":
        rows = [line.split() for line in data[start:].split(b"\n", count)[:count]]
        if len(rows) < count or any(len(row) < len(names) for row in rows):
            raise RejectedPoints("damaged: cut short")
        values = np.array([row[: len(names)] for row in rows], dtype=np.float64).reshape(count, len(names))
        return values[:, [names.index(column) for column in columns]]
    row = np.dtype([(f"p{i}", _PLY_FORMATS[order] + type_) for i, type_ in enumerate(types)])
    if len(data) - start < count * row.itemsize:
        raise RejectedPoints("damaged: cut short")
    table = np.frombuffer(data, row, count=count, offset=start)
    return np.stack([table[f"p{names.index(column)}"].astype(np.float64) for column in columns], axis=1)


def _text(data: bytes) -> NDArray:
    """Numbers in lines, parted by commas, semicolons or blanks; lines of words above them and comments are skipped."""
    text = data.decode("utf-8")
    rows: list[list[float]] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].replace(",", " ").replace(";", " ").split()
        if not words:
            continue
        try:
            rows.append([float(word) for word in words])
        except ValueError:
            if rows:
                raise RejectedPoints(f"line {number} is not numbers: {line[:40]!r}") from None
        _check_count(len(rows))
    if not rows:
        raise RejectedPoints("no points")
    if len({len(row) for row in rows}) > 1:
        raise RejectedPoints("lines of different lengths")
    return np.array(rows)
